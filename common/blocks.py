"""Blocks of tokens by domain, and batches of them.

Dimensions: B blocks in a batch, S block size.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .packing import BlockPacker, tokenize
from .text import TextStream, next_document


logger = logging.get_logger(__name__)

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


def documents_in_need(
    documents: TextStream, is_full: Callable[[str], bool], max_in_vain: int | None = None
) -> Iterator[dict[str, str]]:
    """Yield the documents of all domains that are not full, of one source after the other in turn.

    A source of one domain is read no further than it takes. Nothing tells which domains a source with a column for
    them still holds: it is read to its end, or until `max_in_vain` documents in a row are of full domains.

    Args:
        is_full: Whether a domain needs no more documents.
    """
    texts = deque((source, iter(source.documents), 0) for source in documents.sources)
    while texts:
        source, text, num_in_vain = texts.popleft()
        if not source.has_domain_column and is_full(source.domain):
            continue
        document = next_document(text, source.name)
        if document is None:
            continue
        if not is_full(document["domain"]):
            num_in_vain = 0
            yield document
        elif (num_in_vain := num_in_vain + 1) == max_in_vain:
            logger.warning(
                f"{source.name}: not read on after {max_in_vain} documents in a row of domains that need no more; if "
                "other domains come later, shuffle the documents or give each domain a file of its own."
            )
            continue
        texts.append((source, text, num_in_vain))


def blocks_by_domain(
    documents: TextStream,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_blocks: int | None,
    document_mask: bool = False,
) -> dict[str, list[dict[str, list[int]]]]:
    """Return the first `max_blocks` blocks of each domain, packed as if it was alone."""
    packers: dict[str, BlockPacker] = defaultdict(lambda: BlockPacker(block_size, document_mask))
    blocks: dict[str, list[dict[str, list[int]]]] = defaultdict(list)
    for document in documents_in_need(documents, lambda domain: len(blocks.get(domain, ())) == max_blocks):
        found = blocks[document["domain"]]
        [tokens] = tokenize(tokenizer, [document["text"]])
        num_missing = None if max_blocks is None else max_blocks - len(found)
        found += (block for block, _ in islice(packers[document["domain"]].add(tokens), num_missing))
    return dict(blocks)
