"""Labelled text as a checkpoint reads it."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .checkpoint_source import CheckpointSource
from .checkpoints import load_tokenizer
from .labelled_text import Block, labelled_blocks
from .settings import SettingsError
from .text import open_text
from .text_settings import TextSettings


def load_text_tokenizer(source: CheckpointSource) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `source`.

    Raises:
        SettingsError: if it has none.
    """
    if not source.has_tokenizer:
        raise SettingsError(f"{source.name}: has no tokenizer to read text with; put its files beside the weights.")
    return load_tokenizer(str(source.folder), config=source.config)


def read_blocks(settings: TextSettings, tokenizer: PreTrainedTokenizerBase, block_size: int) -> dict[str, list[Block]]:
    """Return the blocks of each domain of the text that `settings` name.

    Raises:
        SettingsError: if the text cannot be read.
    """
    documents = open_text(
        settings.data, settings.split, settings.text_column, settings.domain_column, whole_folders=True
    )
    return labelled_blocks(documents, tokenizer, block_size, settings.tokens_per_domain)


def check_tokens(name: str, domains: dict[str, list[Block]], config: PreTrainedConfig) -> None:
    """Check that a model with `config` knows all tokens of the blocks; errors call its checkpoint `name`.

    Raises:
        SettingsError: if not.
    """
    largest = max(max(block["input_ids"]) for blocks in domains.values() for block in blocks)
    if largest >= config.vocab_size:
        raise SettingsError(
            f"{name}: its tokenizer gives token {largest}, the model's vocab_size is {config.vocab_size}; put the "
            "model's own tokenizer beside it."
        )
