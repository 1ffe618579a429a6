"""Evaluating checkpoints, one after the other: benchmark tasks, and perplexity by domain."""

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..common.checkpoint_names import NamedCheckpoint
from ..common.checkpoints import check_code, load_config, load_model, load_tokenizer, model_without_weights
from ..common.devices import best_device, free_memory
from ..common.hub_names import hub_datasets
from ..common.labelled_text import Block, labelled_blocks
from ..common.perplexity import TextLosses, measure_perplexity, separates_documents
from ..common.progress import Progress
from ..common.provenance import installed_versions
from ..common.settings import SettingsError
from ..common.text import open_text
from ..common.text_settings import MAX_BLOCK_SIZE
from ..common.tokenizers import tokens_digest
from .differences import average_differences, item_difference, text_difference
from .notes import report_notes
from .results import CheckpointResult, Differences, EvaluationReport, TaskInfo
from .settings import AUTO, EvaluationSettings
from .tasks import ACCURACIES, averages


if TYPE_CHECKING:
    from .harness import HarnessTasks


@dataclass(frozen=True)
class _Evaluated:
    """What is found with one checkpoint; its items and blocks are compared with those of the first one.

    Args:
        infos: by task.
        items: the accuracy of each, by task.
        texts: by domain.
    """

    result: CheckpointResult
    infos: dict[str, TaskInfo]
    items: dict[str, list[float]]
    texts: dict[str, TextLosses]


def evaluate(
    checkpoints: Sequence[NamedCheckpoint],
    settings: EvaluationSettings,
    progress: Progress | None = None,
    keep: Callable[[EvaluationReport], None] = lambda report: None,
) -> EvaluationReport:
    """Return what the checkpoints score, in their order; one of them is in memory at a time.

    All that can be wrong with a checkpoint but its weights is found before the first one is evaluated.

    Args:
        keep: is called with the report so far when a checkpoint is done: what a failure of a later one need not lose.

    Raises:
        SettingsError: if a checkpoint, a task or the text cannot be had, or does not fit the others; if a model gives
            figures that are not finite.
    """
    progress = progress or Progress()
    if settings.tasks:
        check_harness()
    configs = [_language_model_config(checkpoint, settings.trust_remote_code) for checkpoint in checkpoints]
    tokenizers = [load_tokenizer(checkpoint.path, revision=checkpoint.revision) for checkpoint in checkpoints]
    block_size = common_block_size(configs, settings.block_size) if settings.perplexity_data else None
    texts = {} if block_size is None else _read_texts(settings, tokenizers, block_size)
    tasks = _load_tasks(settings)
    versions = _versions(settings)
    done: list[_Evaluated] = []
    for checkpoint, config, tokenizer in zip(checkpoints, configs, tokenizers, strict=True):
        blocks = texts.get(tokens_digest(tokenizer), {})
        done.append(_evaluate_one(checkpoint, config, tokenizer, settings, tasks, blocks, progress))
        if len(done) > 1:
            done[-1].result.differences = _differences(done[-1], done[0])
        results = [evaluated.result for evaluated in done]
        missing = [checkpoint.name for checkpoint in checkpoints[len(done) :]]
        report = EvaluationReport(
            settings=_settings_as_json(settings, block_size),
            tasks=list(done[0].infos.values()),
            checkpoints=results,
            notes=report_notes(results, tasks, settings.limit, missing),
            versions=versions,
            complete=not missing,
        )
        keep(report)
    return report


def check_harness() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        SettingsError: if not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise SettingsError(
            "tasks need lm-evaluation-harness: pip install 'upcycled-moe[evaluation]'; without it, --perplexity-data "
            "alone works."
        )


def common_block_size(configs: Sequence[PreTrainedConfig], asked: int | None) -> int:
    """Return a block size that fits all models: the one that is asked for, or 1024 if they have so many positions.

    Raises:
        SettingsError: if a model has too few.
    """
    positions = [getattr(config, "max_position_embeddings", None) for config in configs]
    fewest = min((number for number in positions if number), default=MAX_BLOCK_SIZE)
    if asked is not None and asked > fewest:
        raise SettingsError(f"block_size={asked} exceeds the {fewest} positions of a model; give at most {fewest}.")
    return asked or min(fewest, MAX_BLOCK_SIZE)


def _language_model_config(checkpoint: NamedCheckpoint, trust_remote_code: bool) -> PreTrainedConfig:
    check_code(checkpoint.path, trust_remote_code=trust_remote_code, revision=checkpoint.revision)
    config = load_config(checkpoint.path, revision=checkpoint.revision)
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        raise SettingsError(f"{checkpoint.path}: holds a sequence classifier; give a language model.")
    # Its code and its shape are wrong now, or not at all.
    model_without_weights(checkpoint.path, config, revision=checkpoint.revision)
    return config


def _load_tasks(settings: EvaluationSettings) -> "HarnessTasks | None":
    if not settings.tasks:
        return None
    # The harness takes seconds to import, and may not be installed.
    from .harness import load_tasks

    return load_tasks(settings.tasks, settings.offline_data)


def _read_texts(
    settings: EvaluationSettings, tokenizers: Sequence[PreTrainedTokenizerBase], block_size: int
) -> dict[str, dict[str, list[Block]]]:
    """Return the blocks of each domain, by the digest of the tokenizer."""
    documents = open_text(
        settings.perplexity_data, settings.split, settings.text_column, settings.domain_column, whole_folders=True
    )
    different = {tokens_digest(tokenizer): tokenizer for tokenizer in tokenizers}
    return {
        digest: labelled_blocks(documents, tokenizer, block_size, settings.tokens_per_domain)
        for digest, tokenizer in different.items()
    }


def _evaluate_one(
    checkpoint: NamedCheckpoint,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    tasks: "HarnessTasks | None",
    blocks: dict[str, list[Block]],
    progress: Progress,
) -> _Evaluated:
    """Return what is found with a checkpoint; the model is gone from memory afterwards."""
    dtype = settings.dtype if settings.dtype == AUTO else getattr(torch, settings.dtype)
    model = load_model(checkpoint.path, config, dtype=dtype, device=best_device(), revision=checkpoint.revision)
    result = CheckpointResult(
        name=checkpoint.name,
        path=checkpoint.path,
        revision=checkpoint.revision,
        model_type=config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        tokenizer=tokens_digest(tokenizer),
    )
    evaluated = _Evaluated(result, {}, {}, {})
    if blocks:
        evaluated.texts.update(_read_blocks(result, model, tokenizer, blocks, settings, progress))
    if tasks is not None:
        from .harness import score_tasks
        from .language_model import LanguageModel

        asked = LanguageModel(model, tokenizer, settings.batch_size, checkpoint.name, progress)
        result.tasks, infos, items = score_tasks(asked, tasks, settings.limit)
        evaluated.infos.update(infos)
        evaluated.items.update(items)
        result.num_truncated = asked.num_truncated()
        result.num_new_tokens = asked.num_new_tokens
        accuracies = {name: info for name, info in infos.items() if info.metric in ACCURACIES and info.num_items}
        result.averages = averages({name: result.tasks[name][info.metric] for name, info in accuracies.items()})
        del asked
    del model
    free_memory()
    return evaluated


def _read_blocks(
    result: CheckpointResult,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: dict[str, list[Block]],
    settings: EvaluationSettings,
    progress: Progress,
) -> dict[str, TextLosses]:
    """Return the losses by domain, and put into `result` what they come to."""
    longest = max((block for found in blocks.values() for block in found), key=lambda block: len(block["input_ids"]))
    result.documents_alone = not separates_documents(model, longest["input_ids"])
    with progress.task(f"Perplexity of {result.name}", sum(map(len, blocks.values())), "blocks") as advance:
        texts = measure_perplexity(
            model, tokenizer, blocks, settings.blocks_per_batch, result.documents_alone, advance
        )
    result.domains = {name: text.mean() for name, text in texts.items()}
    for name, domain in result.domains.items():
        if not math.isfinite(domain.loss):
            raise SettingsError(
                f"{result.name}: its loss on domain {name!r} is not finite; its weights are broken, or too large for "
                "its dtype (try --dtype float32)."
            )
    return texts


def _differences(one: _Evaluated, first: _Evaluated) -> Differences:
    tasks = {name: item_difference(items, first.items[name]) for name, items in one.items.items() if items}
    same_tokens = one.result.tokenizer == first.result.tokenizer
    texts = {name: text_difference(text, first.texts[name], same_tokens) for name, text in one.texts.items()}
    return Differences(
        tasks=tasks,
        averages=average_differences(one.result.averages, tasks),
        domains={name: difference for name, difference in texts.items() if difference is not None},
    )


def _settings_as_json(settings: EvaluationSettings, block_size: int | None) -> dict[str, Any]:
    offline = None if settings.offline_data is None else str(settings.offline_data)
    return asdict(settings) | {
        "tasks": list(settings.tasks),
        "perplexity_data": list(settings.perplexity_data),
        # Later nobody can tell them from local text.
        "perplexity_datasets": hub_datasets(settings.perplexity_data),
        "offline_data": offline,
        "block_size": block_size,
    }


def _versions(settings: EvaluationSettings) -> dict[str, str]:
    versions = installed_versions()
    if settings.tasks:
        versions["lm-eval"] = importlib.metadata.version("lm-eval")
    return versions
