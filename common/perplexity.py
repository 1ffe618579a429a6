"""How well a model predicts text, by domain.

Dimensions: B blocks in a batch, S their length.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from .blocks import IGNORED_LABEL, collate_blocks
from .domain_loss import DomainLoss
from .labelled_text import Block, batches


# Of a dtype's precision, times the largest logit: what sums in another order may differ by, and no more. A stricter
# bound than needed costs time only.
_ROUNDING = 16
_PROBED_TOKENS = 64


@dataclass(frozen=True)
class TextLosses:
    """What a model finds in the text of a domain.

    Args:
        losses: summed over the targets of each block, in nats. [B]
        counts: targets of each block. [B]
        num_bytes: of the text of all targets.
    """

    losses: torch.Tensor
    counts: torch.Tensor
    num_bytes: int

    def mean(self) -> DomainLoss:
        """Return the loss over all targets."""
        return domain_loss(self.losses, self.counts, self.num_bytes)


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Mapping[str, Sequence[Block]],
    batch_size: int,
    documents_alone: bool = False,
    advance: Callable[[int], None] = lambda num_blocks: None,
) -> dict[str, TextLosses]:
    """Return the losses of `model` on the blocks of each domain.

    As in training with a document mask, a token sees its own document only, and the first one of what a block holds of
    a document is not predicted.

    Args:
        documents_alone: whether the model reads one document at a time; see [`separates_documents`].
        advance: is called with the number of blocks that were read.
    """
    found = {}
    for name, blocks in domains.items():
        losses, counts = [], []
        for batch in batches(blocks, 1 if documents_alone else batch_size):
            read = (
                losses_of_documents(model, batch[0]) if documents_alone else block_losses(model, collate_blocks(batch))
            )
            losses.append(read[0])
            counts.append(read[1])
            advance(len(batch))
        num_bytes = sum(target_bytes(tokenizer, block) for block in blocks)
        found[name] = TextLosses(torch.cat(losses).cpu(), torch.cat(counts).cpu(), num_bytes)
    return found


@torch.no_grad()
def separates_documents(model: PreTrainedModel, tokens: Sequence[int]) -> bool:
    """Return whether `model` reads a document of a block as if nothing stood before it.

    Transformers masks what is before it where positions start anew; models with a state or with biases for positions
    know nothing of that. It is found by trying: a document must give the same logits behind two different ones.

    Args:
        tokens: some that the model will read.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    tokens = list(tokens[:_PROBED_TOKENS])
    begin = len(tokens) // 2
    others = [(token + 1) % model.config.get_text_config().vocab_size for token in tokens[:begin]]
    logits = model(
        input_ids=torch.tensor([tokens, others + tokens[begin:]], device=model.device),
        position_ids=torch.tensor([[*range(begin), *range(len(tokens) - begin)]] * 2, device=model.device),
        use_cache=False,
    ).logits[:, begin:]
    bound = _ROUNDING * torch.finfo(logits.dtype).eps * logits.abs().max()
    return bool((logits[0] - logits[1]).abs().max() <= bound)


def losses_of_documents(model: PreTrainedModel, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what [`block_losses`] does for a batch of one `block`; the model reads one document at a time."""
    pieces = [{"input_ids": block["input_ids"][begin:end]} for begin, end in document_bounds(block)]
    # The first token of a document alone predicts nothing; without positions, they are counted from its beginning.
    read = [block_losses(model, collate_blocks([piece])) for piece in pieces if len(piece["input_ids"]) > 1]
    if not read:
        return torch.zeros(1), torch.zeros(1, dtype=torch.long)
    losses, counts = zip(*read, strict=True)
    return torch.cat(losses).sum(0, keepdim=True), torch.cat(counts).sum(0, keepdim=True)


@torch.no_grad()
def block_losses(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss [B] of each block in nats, and how many targets [B] it has.

    Args:
        batch: `input_ids`, `labels` and, if it holds several documents, `position_ids` [B, S].
    """
    inputs = {name: values.to(model.device) for name, values in batch.items()}
    labels = inputs.pop("labels")
    # With a cache, attention would not tell the documents apart.
    logits = model(**inputs, use_cache=False).logits
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


def document_bounds(block: Block) -> list[tuple[int, int]]:
    """Return where each document of a block begins and ends."""
    starts = [index for index, position in enumerate(block["position_ids"]) if position == 0]
    return list(zip(starts, [*starts[1:], len(block["input_ids"])], strict=True))


def target_bytes(tokenizer: PreTrainedTokenizerBase, block: Block) -> int:
    """Return the bytes in UTF-8 of the text of all targets of a block; an end-of-text token has none.

    Where a block cuts a character in two, each part counts as the three bytes of its replacement.
    """
    num_bytes = 0
    for start, end in document_bounds(block):
        tokens = block["input_ids"][start:end]
        num_bytes += _num_bytes(tokenizer, tokens) - _num_bytes(tokenizer, tokens[:1])
    return num_bytes


def _num_bytes(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> int:
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode())
