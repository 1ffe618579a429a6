"""Learning coefficients: the dense model is fit to data, and nothing of it moves but what the experts count."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.checkpoints import check_code, load_config, load_model
from ..common.devices import best_device, free_memory
from ..common.labelled_text import Block
from ..common.learned_merge.merge import LearnedMerge
from ..common.moe_source import MoeSource
from ..common.progress import Progress
from ..common.settings import SettingsError
from ..common.text_blocks import check_tokens, load_text_tokenizer, read_blocks
from ..common.text_settings import TextSettings
from ..preference.fitting import FitRecord, fit_coefficients
from ..preference.pairs import read_pairs
from .coefficients import MergeCoefficients, average_coefficients
from .config import dense_config
from .layout import ExpertLayout
from .learned_ffns import LearnedFfns
from .settings import SHARED_EXPERT_WEIGHT, LearnSettings
from .tensors import dense_tensors
from .usage import coefficients_by_usage


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


def check_learning(source: MoeSource, layout: ExpertLayout, settings: LearnSettings) -> None:
    """Check, before anything is read, that coefficients of `source` can be learned as `settings` say.

    Raises:
        SettingsError: if the loss is not for the model, or there is nothing to learn.
    """
    is_classifier = source.config.architectures[0].endswith("ForSequenceClassification")
    loss = settings.fit.loss
    if loss == "bradley_terry" and not (is_classifier and source.config.num_labels == 1):
        raise SettingsError(
            f"{source.name}: loss='bradley_terry' needs a reward model, a sequence classifier of one label; choose lm "
            "or dpo for a language model."
        )
    if loss != "bradley_terry" and is_classifier:
        raise SettingsError(f"{source.name}: loss={loss!r} needs a language model; choose bradley_terry.")
    if layout.num_copies == 1:
        raise SettingsError(
            f"{source.name}: has one copy of each slice of an FFN, so no coefficients to learn; choose another method."
        )
    if settings.shared_expert_weight is not None and not layout.has_shared_expert:
        raise SettingsError(
            f"{source.name}: has no shared expert for shared_expert_weight={settings.shared_expert_weight}; leave it "
            "out."
        )


def read_lesson(source: MoeSource, settings: LearnSettings) -> Lesson:
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
        data = Dataset.from_list([{name: list(values) for name, values in block.items()} for block in blocks])
    else:
        data = read_pairs(settings.data)
        domains = {"pairs": _conversation_blocks(data, tokenizer, settings.fit.max_length)}
    check_tokens(source.name, domains, source.config)
    return Lesson(tokenizer, data, domains)


def initial_coefficients(
    source: MoeSource, layout: ExpertLayout, settings: LearnSettings, lesson: Lesson, progress: Progress
) -> MergeCoefficients:
    """Return the coefficients to start from, with λ as it stays.

    Raises:
        SettingsError: if the routers do not use their experts on the data.
    """
    initial = average_coefficients(layout)
    if settings.initial == "usage":
        of_pass = settings.data if isinstance(settings.data, TextSettings) else TextSettings
        initial = coefficients_by_usage(source, layout, lesson.blocks, of_pass.batch_size, of_pass.dtype, progress)
        free_memory()
    if not layout.has_shared_expert:
        return initial
    weight = settings.shared_expert_weight
    weight = SHARED_EXPERT_WEIGHT if weight is None else weight
    return replace(initial, shared=dict.fromkeys(layout.moe_layers, weight))


def learn_coefficients(
    source: MoeSource,
    layout: ExpertLayout,
    settings: LearnSettings,
    lesson: Lesson,
    initial: MergeCoefficients,
    progress: Progress,
) -> tuple[MergeCoefficients, FitRecord]:
    """Return coefficients that bring the loss down from where it is at `initial`, and how that went.

    In memory are the dense model in float32 and gradients of its FFNs; experts are read from their files.

    Raises:
        SettingsError: if the reference does not fit, or the loss cannot be computed.
    """
    reference = None if settings.reference is None else _load_reference(settings.reference, source)
    model = dense_model(source, layout)
    ffns = LearnedFfns(source, layout, initial, settings.per)
    record = fit_coefficients(
        LearnedMerge(model, ffns.groups),
        model,
        lesson.tokenizer,
        lesson.data,
        settings.fit,
        reference=reference,
        progress=progress,
    )
    return ffns.coefficients(), record


def dense_model(source: MoeSource, layout: ExpertLayout) -> PreTrainedModel:
    """Return the dense model that `source` is merged into, in float32 on the best device; merged FFNs are zero."""
    config = dense_config(source.config, layout.width)
    weights = {
        planned.name: source.tensors[planned.name].load()
        if planned.name in source.tensors
        else torch.zeros(planned.shape)
        for planned in dense_tensors(source, layout, average_coefficients(layout))
    }
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    return model.to(best_device())


def _load_reference(name: str, source: MoeSource) -> PreTrainedModel:
    check_code(name, trust_remote_code=False)
    config = load_config(name, own_code=False)
    if config.vocab_size != source.config.vocab_size:
        raise SettingsError(
            f"{name}: has vocab_size={config.vocab_size}, and {source.name} {source.config.vocab_size}; give a "
            "reference with the same tokenizer."
        )
    return load_model(name, config, dtype=torch.float32, device=best_device(), own_code=False)


def _conversation_blocks(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Block]:
    """Return both conversations of each pair as blocks, cut to `max_length`, in the order of their lengths."""
    blocks = []
    for pair in pairs:
        for answer in ("chosen", "rejected"):
            tokens = tokenizer.apply_chat_template(pair["prompt"] + pair[answer], return_dict=True)["input_ids"]
            tokens = array("i", tokens[:max_length])
            blocks.append({"input_ids": tokens, "position_ids": array("i", range(len(tokens)))})
    return sorted(blocks, key=lambda block: len(block["input_ids"]))
