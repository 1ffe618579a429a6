"""Text with domains as blocks of tokens, some of each domain.

Dimensions: S block size.
"""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from .blocks import blocks_by_domain
from .settings import SettingsError
from .text import TextStream


Block = dict[str, list[int]]

# Tables have a row for each; more are a column that says something else.
MAX_DOMAINS = 64


def labelled_blocks(
    documents: TextStream, tokenizer: PreTrainedTokenizerBase, block_size: int, tokens_per_domain: int
) -> dict[str, list[Block]]:
    """Return the first `tokens_per_domain` tokens of each domain, in the order of their names.

    All blocks are `block_size` long but the last one of a domain. A token attends to its own document only.

    Raises:
        SettingsError: if the text cannot be read, a domain has no tokens, or there are too many of them.
    """
    max_blocks = -(-tokens_per_domain // block_size)
    domains = blocks_by_domain(documents, tokenizer, block_size, max_blocks, document_mask=True, keep_rest=True)
    if len(domains) > MAX_DOMAINS:
        names = ", ".join(map(repr, list(domains)[:3]))
        raise SettingsError(
            f"the text has {len(domains)} domains ({names}, ...), and at most {MAX_DOMAINS} fit a report; name "
            "another domain_column, or files that are one domain each."
        )
    for name, blocks in domains.items():
        if not blocks:
            raise SettingsError(f"the text of domain {name!r} has no tokens at all; leave it out.")
        surplus = sum(map(_length, blocks)) - tokens_per_domain
        if surplus > 0:
            blocks[-1] = {column: values[:-surplus] for column, values in blocks[-1].items()}
    return dict(sorted(domains.items()))


def batches(blocks: Sequence[Block], batch_size: int) -> Iterator[Sequence[Block]]:
    """Yield `batch_size` blocks of one length at a time, in order; the last, shorter block goes alone."""
    begin = 0
    while begin < len(blocks):
        end = begin + 1
        while end < min(begin + batch_size, len(blocks)) and _length(blocks[end]) == _length(blocks[begin]):
            end += 1
        yield blocks[begin:end]
        begin = end


def _length(block: Block) -> int:
    return len(block["input_ids"])
