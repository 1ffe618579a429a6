"""Blocks of tokens by domain, and batches of them.

Dimensions: B blocks in a batch, S block size.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .packing import BlockPacker, tokenize
from .text import TextStream, next_document


IGNORED_LABEL = -100


def collate_blocks(blocks: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `labels` and, where blocks say where documents begin, `position_ids` [B, S].

    Every token but the first of a document is a target, unlike with Transformers' own collator, which ignores the
    end-of-text tokens of models that pad with them.
    """
    input_ids = torch.tensor([block["input_ids"] for block in blocks])
    labels = torch.tensor([block["labels"] for block in blocks]) if "labels" in blocks[0] else input_ids.clone()
    batch = {"input_ids": input_ids, "labels": labels}
    if "position_ids" in blocks[0]:
        # Without an attention mask, Transformers keeps apart what positions that start anew tell apart.
        batch["position_ids"] = torch.tensor([block["position_ids"] for block in blocks])
        labels[batch["position_ids"] == 0] = IGNORED_LABEL
    return batch


def collate_blocks_for_flash_attention(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what [`collate_blocks`] does, and the bounds of documents in the batch as flash attention takes them.

    From positions alone Transformers finds them in batches of one block only, anew in each layer.
    """
    batch = collate_blocks(blocks)
    if "position_ids" in batch:
        starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
        bounds = torch.cat([starts, torch.tensor([batch["position_ids"].numel()])])
        longest = int(bounds.diff().max())
        bounds = bounds.to(torch.int32)
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return batch


def count_targets(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return how many tokens of a batch are predicted."""
    # Under context parallelism a process has a part of each sequence, whose targets were shifted before the cut.
    targets = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
    return (targets != IGNORED_LABEL).sum()


def blocks_by_domain(
    documents: TextStream,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_blocks: int | None,
    document_mask: bool = False,
    keep_rest: bool = False,
) -> dict[str, list[dict[str, list[int]]]]:
    """Return the first `max_blocks` blocks of each domain, packed as if it was alone.

    With `keep_rest`, what the text of a domain leaves over is its last block, shorter than the others.
    """
    packers: dict[str, BlockPacker] = defaultdict(lambda: BlockPacker(block_size, document_mask))
    blocks: dict[str, list[dict[str, list[int]]]] = {}
    texts = deque((source, iter(source.documents)) for source in documents.sources)
    while texts:
        source, text = texts.popleft()
        domain = None if source.has_domain_column else source.domain
        if domain in blocks and len(blocks[domain]) == max_blocks:
            continue
        document = next_document(text, source.name)
        if document is None:
            continue
        texts.append((source, text))
        found = blocks.setdefault(document["domain"], [])
        if len(found) == max_blocks:
            continue
        [tokens] = tokenize(tokenizer, [document["text"]])
        num_missing = None if max_blocks is None else max_blocks - len(found)
        found += (block for block, _ in islice(packers[document["domain"]].add(tokens), num_missing))
    if keep_rest:
        for name, found in blocks.items():
            if len(found) != max_blocks and (rest := packers[name].end()) is not None:
                found.append(rest)
    return blocks
