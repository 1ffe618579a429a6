"""Text with domains as blocks of tokens, some of each domain, to be looked at and not trained on.

Dimensions: S block size.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .blocks import documents_in_need
from .packing import BlockPacker, beginning_of_text, tokenize
from .settings import SettingsError
from .text import TextStream


logger = logging.get_logger(__name__)

# `input_ids` and `position_ids` [S] in int32: lists would take several times the memory.
Block = Mapping[str, array]

# Tables have a row for each; more are a column that says something else.
MAX_DOMAINS = 64
# Text with a domain column may be of any length, and all its domains full early on.
MAX_DOCUMENTS_IN_VAIN = 10_000


class _Domain:
    """The first `max_tokens` tokens of a domain, in blocks."""

    def __init__(self, block_size: int, max_tokens: int):
        self.blocks: list[Block] = []
        self.num_missing = max_tokens
        self._packer = BlockPacker(block_size, document_mask=True)

    def add(self, tokens: Sequence[int]) -> None:
        tokens = tokens[: self.num_missing]
        self.num_missing -= len(tokens)
        self.blocks += (_compact(block) for block, _ in self._packer.add(tokens))

    def end(self) -> list[Block]:
        """Return all blocks; what the text leaves over is the last one."""
        if (rest := self._packer.end()) is not None:
            self.blocks.append(_compact(rest))
        return self.blocks


def labelled_blocks(
    documents: TextStream, tokenizer: PreTrainedTokenizerBase, block_size: int, tokens_per_domain: int
) -> dict[str, list[Block]]:
    """Return the first `tokens_per_domain` tokens of each domain, in the order of their names.

    All blocks are `block_size` long but the last one of a domain. A token attends to its own document only. A document
    begins as the tokenizer lets a text begin by default, with a beginning-of-text token or without, and ends with the
    end-of-text token; one without text is left out. Of a domain that has fewer tokens a warning tells.

    A source with a domain column is read until `MAX_DOCUMENTS_IN_VAIN` documents in a row are of domains that need no
    more.

    Raises:
        SettingsError: if the text cannot be read, no token of a domain can be predicted from one before it, or there
            are too many domains.
    """
    if tokens_per_domain < 2:
        raise SettingsError(
            f"tokens_per_domain={tokens_per_domain} must be at least 2, of which one predicts the other."
        )
    domains: dict[str, _Domain] = {}
    begin, end = beginning_of_text(tokenizer), tokenize(tokenizer, [""])[0]

    def is_full(name: str) -> bool:
        return name in domains and not domains[name].num_missing

    for document in documents_in_need(documents, is_full, MAX_DOCUMENTS_IN_VAIN):
        name = document["domain"]
        if name not in domains:
            domains[name] = _Domain(block_size, tokens_per_domain)
            _check_number(domains)
        [tokens] = tokenize(tokenizer, [document["text"]])
        if len(tokens) > len(end):
            domains[name].add([*begin, *tokens])
    _warn_of_short(domains, tokens_per_domain)
    blocks = {name: domains[name].end() for name in sorted(domains)}
    for name in blocks:
        _check_targets(name, blocks[name], {*begin, *end})
    return blocks


def _check_number(domains: Mapping[str, _Domain]) -> None:
    if len(domains) > MAX_DOMAINS:
        names = ", ".join(map(repr, list(domains)[:3]))
        raise SettingsError(
            f"the text has more than {MAX_DOMAINS} domains ({names}, ...), and no more fit a report; name another "
            "domain_column, or files that are one domain each."
        )


def _check_targets(name: str, blocks: Sequence[Block], not_text: set[int]) -> None:
    """Check that a token of text, none of `not_text`, follows another one of its document in its block."""
    if not blocks:
        raise SettingsError(f"the text of domain {name!r} has no tokens at all; leave it out.")
    if not any(
        position > 0 and token not in not_text
        for block in blocks
        for token, position in zip(block["input_ids"], block["position_ids"], strict=True)
    ):
        raise SettingsError(
            f"the text of domain {name!r} has no token that follows another in its document; leave it out, or raise "
            "tokens_per_domain or block_size if they are small."
        )


def _warn_of_short(domains: Mapping[str, _Domain], tokens_per_domain: int) -> None:
    short = {name: tokens_per_domain - domain.num_missing for name, domain in domains.items() if domain.num_missing}
    if short:
        counts = ", ".join(f"{name!r} {short[name]}" for name in sorted(short))
        logger.warning(f"Domains with fewer tokens than tokens_per_domain={tokens_per_domain}: {counts}.")


def batches(blocks: Sequence[Block], batch_size: int) -> Iterator[Sequence[Block]]:
    """Yield `batch_size` blocks of one length at a time, in order; the last, shorter block goes alone."""
    begin = 0
    while begin < len(blocks):
        end = begin + 1
        while end < min(begin + batch_size, len(blocks)) and _length(blocks[end]) == _length(blocks[begin]):
            end += 1
        yield blocks[begin:end]
        begin = end


def _compact(block: Mapping[str, Sequence[int]]) -> Block:
    return {column: array("i", values) for column, values in block.items()}


def _length(block: Block) -> int:
    return len(block["input_ids"])
