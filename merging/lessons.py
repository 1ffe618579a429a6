"""The data that coefficients are learned from."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..common.checkpoint_source import CheckpointSource
from ..common.checkpoints import check_code, load_config
from ..common.labelled_text import Block
from ..common.settings import SettingsError
from ..common.text_blocks import check_tokens, load_text_tokenizer, read_blocks
from ..preference.pairs import read_pairs
from ..preference.settings import check_trl
from ..preference.template import conversation_ids, keep_padding
from .settings import LearnSettings


@dataclass(frozen=True)
class Lesson:
    """What coefficients are learned from, read and checked.

    Args:
        tokenizer: of the model.
        data: pairs, or blocks of text as `input_ids`.
        blocks: the same as the routers see it, by domain.
    """

    tokenizer: PreTrainedTokenizerBase
    data: Dataset
    blocks: Mapping[str, Sequence[Block]]


def check_loss(source: CheckpointSource, settings: LearnSettings) -> None:
    """Check, before anything is read, that the loss can be computed of a model like `source`.

    Raises:
        SettingsError: if it is not for the model, the reference is not, or trl is missing.
    """
    loss = settings.fit.loss
    is_classifier = source.config.architectures[0].endswith("ForSequenceClassification")
    if loss == "bradley_terry" and not (is_classifier and source.config.num_labels == 1):
        raise SettingsError(
            f"{source.name}: loss='bradley_terry' needs a reward model, a sequence classifier of one label; choose lm "
            "or dpo for a language model."
        )
    if loss != "bradley_terry" and is_classifier:
        raise SettingsError(f"{source.name}: loss={loss!r} needs a language model; choose bradley_terry.")
    if loss != "lm":
        check_trl(f"loss={loss!r}")
    if settings.reference is not None:
        _check_reference(source, settings.reference)


def read_lesson(source: CheckpointSource, settings: LearnSettings) -> Lesson:
    """Return the data of `settings`.

    Raises:
        SettingsError: if it cannot be read, or does not fit the model or its tokenizer.
    """
    tokenizer = load_text_tokenizer(source)
    if settings.fit.loss == "lm":
        block_size = settings.data.block_size_for({source.name: source.config.max_position_embeddings})
        domains = read_blocks(settings.data, tokenizer, block_size)
        # What is left over of a domain is shorter, and would stand in a batch with no other.
        blocks = [block for blocks in domains.values() for block in blocks if len(block["input_ids"]) == block_size]
        if not blocks:
            raise SettingsError(
                f"{', '.join(settings.data.data)}: no domain has {block_size} tokens, which make a block; give more "
                "text, or a smaller block_size."
            )
        data = Dataset.from_list([{name: list(values) for name, values in block.items()} for block in blocks])
    else:
        if tokenizer.chat_template is None:
            raise SettingsError(
                f"{source.name}: its tokenizer has no chat template to read conversations with; put one beside the "
                "weights (chat_template.jinja)."
            )
        if settings.fit.loss == "bradley_terry":
            keep_padding(tokenizer, source.config, source.name)
        data = read_pairs(settings.data)
        domains = {"pairs": _conversation_blocks(data, tokenizer, settings.fit.max_length)}
    check_tokens(source.name, domains, source.config)
    return Lesson(tokenizer, data, domains)


def _check_reference(source: CheckpointSource, name: str) -> None:
    check_code(name, trust_remote_code=False)
    config = load_config(name, own_code=False)
    architecture = (config.architectures or ["model of no named architecture"])[0]
    if not architecture.endswith("ForCausalLM"):
        raise SettingsError(f"{name}: is a {architecture}; give a language model as the reference.")
    if config.vocab_size != source.config.vocab_size:
        raise SettingsError(
            f"{name}: has vocab_size={config.vocab_size}, and {source.name} {source.config.vocab_size}; give a "
            "reference with the same tokenizer."
        )


def _conversation_blocks(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Block]:
    """Return both conversations of each pair as blocks, cut to `max_length`, in the order of their lengths."""
    blocks = []
    for pair in pairs:
        for answer in ("chosen", "rejected"):
            tokens = array("i", conversation_ids(tokenizer, pair["prompt"] + pair[answer])[:max_length])
            blocks.append({"input_ids": tokens, "position_ids": array("i", range(len(tokens)))})
    return sorted(blocks, key=lambda block: len(block["input_ids"]))
