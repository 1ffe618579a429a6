"""How well a model predicts text, by domain.

Dimensions: B blocks in a batch, S their length.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ..common.blocks import IGNORED_LABEL, collate_blocks
from ..common.labelled_text import Block, batches
from .results import DomainLoss


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Mapping[str, Sequence[Block]],
    batch_size: int,
    advance: Callable[[int], None] = lambda num_blocks: None,
) -> dict[str, DomainLoss]:
    """Return the loss of `model` on the blocks of each domain.

    As in training with a document mask, a token sees its own document only, and the first one of what a block holds of
    a document is not predicted.

    Args:
        advance: is called with the number of blocks that were read.
    """
    found = {}
    for name, blocks in domains.items():
        losses, counts = [], []
        for batch in batches(blocks, batch_size):
            batch_losses, batch_counts = block_losses(model, collate_blocks(batch))
            losses.append(batch_losses)
            counts.append(batch_counts)
            advance(len(batch))
        num_bytes = sum(target_bytes(tokenizer, block) for block in blocks)
        found[name] = domain_loss(torch.cat(losses).cpu(), torch.cat(counts).cpu(), num_bytes)
    return found


@torch.no_grad()
def block_losses(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss [B] of each block in nats, and how many targets [B] it has.

    Args:
        batch: `input_ids`, `position_ids` and `labels` [B, S].
    """
    labels = batch["labels"].to(model.device)
    # With a cache, attention would not tell the documents apart.
    logits = model(
        input_ids=batch["input_ids"].to(model.device),
        position_ids=batch["position_ids"].to(model.device),
        use_cache=False,
    ).logits
    # A block at a time: logits in float32 are the largest tensor by far.
    sums = [
        F.cross_entropy(row[:-1].float(), targets[1:], ignore_index=IGNORED_LABEL, reduction="none")
        .to(sum_dtype(row.device))
        .sum()
        for row, targets in zip(logits, labels, strict=True)
    ]
    return torch.stack(sums), (labels[:, 1:] != IGNORED_LABEL).sum(1)


def domain_loss(losses: torch.Tensor, counts: torch.Tensor, num_bytes: int) -> DomainLoss:
    """Return the mean loss over all targets, from the summed `losses` and the `counts` of targets of blocks [B].

    The standard error is that of a ratio of sums over blocks, which are taken for independent:
    `se = √(B / (B - 1) · Σ_b (l_b - loss · n_b)²) / Σ_b n_b`. It is too small where documents go on over several.

    Source: Cochran, Sampling Techniques (3rd edition, 1977), equation 6.13 without the finite population.
    """
    losses, counts = losses.double(), counts.double()
    num_tokens = counts.sum()
    loss = losses.sum() / num_tokens
    stderr = None
    if len(losses) > 1:
        spread = ((losses - loss * counts) ** 2).sum() * len(losses) / (len(losses) - 1)
        stderr = math.sqrt(spread) / num_tokens.item()
    return DomainLoss(loss.item(), stderr, int(num_tokens), num_bytes, len(losses))


def target_bytes(tokenizer: PreTrainedTokenizerBase, block: Block) -> int:
    """Return the bytes in UTF-8 of the text of all targets of a block; an end-of-text token has none.

    Where a block cuts a character in two, each part counts as the three bytes of its replacement.
    """
    starts = [index for index, position in enumerate(block["position_ids"]) if position == 0]
    ends = [*starts[1:], len(block["input_ids"])]
    num_bytes = 0
    for start, end in zip(starts, ends, strict=True):
        tokens = block["input_ids"][start:end]
        num_bytes += _num_bytes(tokenizer, tokens) - _num_bytes(tokenizer, tokens[:1])
    return num_bytes


def _num_bytes(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> int:
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode())
