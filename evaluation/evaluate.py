"""Evaluating checkpoints, one after the other: benchmark tasks, and perplexity by domain."""

import gc
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..common.checkpoint_names import NamedCheckpoint
from ..common.checkpoints import check_code, load_config, load_model, load_tokenizer
from ..common.devices import best_device
from ..common.labelled_text import Block, labelled_blocks
from ..common.packing import tokenizer_digest
from ..common.progress import Progress
from ..common.provenance import installed_versions
from ..common.settings import SettingsError
from ..common.text import open_text
from .perplexity import measure_perplexity
from .results import CheckpointResult, EvaluationReport, TaskInfo
from .settings import AUTO, MAX_BLOCK_SIZE, EvaluationSettings
from .tasks import ACCURACIES, averages


if TYPE_CHECKING:
    from .harness import HarnessTasks


def evaluate(
    checkpoints: Sequence[NamedCheckpoint], settings: EvaluationSettings, progress: Progress | None = None
) -> EvaluationReport:
    """Return what the checkpoints score, in their order; one of them is in memory at a time.

    All that can be wrong with a checkpoint but its weights is found before the first one is evaluated.

    Raises:
        SettingsError: if a checkpoint, a task or the text cannot be had, or does not fit the others.
    """
    progress = progress or Progress()
    if settings.tasks:
        check_harness()
    configs = [_language_model_config(checkpoint, settings.trust_remote_code) for checkpoint in checkpoints]
    tokenizers = [load_tokenizer(checkpoint.path, revision=checkpoint.revision) for checkpoint in checkpoints]
    block_size = common_block_size(configs, settings.block_size) if settings.perplexity_data else None
    texts = {} if block_size is None else _read_texts(settings, tokenizers, block_size)
    tasks = _load_tasks(settings)
    results, infos = [], {}
    for checkpoint, config, tokenizer in zip(checkpoints, configs, tokenizers, strict=True):
        blocks = texts.get(tokenizer_digest(tokenizer), {})
        result, found = _evaluate_one(checkpoint, config, tokenizer, settings, tasks, blocks, progress)
        infos |= found
        results.append(result)
    return EvaluationReport(
        settings=_settings_as_json(settings, block_size),
        tasks=list(infos.values()),
        checkpoints=results,
        notes=_notes(settings, tasks, results),
        versions=_versions(settings),
    )


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
    documents = open_text(settings.perplexity_data, settings.split, settings.text_column, settings.domain_column)
    different = {tokenizer_digest(tokenizer): tokenizer for tokenizer in tokenizers}
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
) -> tuple[CheckpointResult, dict[str, TaskInfo]]:
    """Return the result of a checkpoint, and the tasks; the model is gone from memory afterwards."""
    dtype = settings.dtype if settings.dtype == AUTO else getattr(torch, settings.dtype)
    model = load_model(checkpoint.path, config, dtype=dtype, device=best_device(), revision=checkpoint.revision)
    result = CheckpointResult(
        name=checkpoint.name,
        path=checkpoint.path,
        revision=checkpoint.revision,
        model_type=config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        tokenizer=tokenizer_digest(tokenizer),
    )
    num_blocks = sum(map(len, blocks.values()))
    if num_blocks:
        with progress.task(f"Perplexity of {checkpoint.name}", num_blocks, "blocks") as advance:
            result.domains = measure_perplexity(model, tokenizer, blocks, settings.blocks_per_batch, advance)
    infos: dict[str, TaskInfo] = {}
    if tasks is not None:
        from .harness import LanguageModel, score_tasks

        asked = LanguageModel(model, tokenizer, settings.batch_size, checkpoint.name, progress)
        result.tasks, infos = score_tasks(asked, tasks, settings.limit)
        result.num_truncated = asked.num_truncated()
        accuracies = {name: info for name, info in infos.items() if info.metric in ACCURACIES and info.num_items}
        result.averages = averages({name: result.tasks[name][info.metric] for name, info in accuracies.items()})
        del asked
    del model
    _free_memory()
    return result, infos


def _free_memory() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _settings_as_json(settings: EvaluationSettings, block_size: int | None) -> dict[str, Any]:
    offline = None if settings.offline_data is None else str(settings.offline_data)
    return asdict(settings) | {
        "tasks": list(settings.tasks),
        "perplexity_data": list(settings.perplexity_data),
        "offline_data": offline,
        "block_size": block_size,
    }


def _notes(
    settings: EvaluationSettings, tasks: "HarnessTasks | None", results: Sequence[CheckpointResult]
) -> list[str]:
    notes = []
    if settings.limit is not None and tasks is not None:
        notes.append(f"A quick look: the first {settings.limit} items of each task only.")
    if tasks is not None and tasks.offline:
        notes.append(
            "Offline data: samples of the sets, scored as the harness scores the whole ones; not to be compared "
            "with published figures."
        )
        if tasks.left_out:
            notes.append(f"Not in the offline data, and in no average: {', '.join(tasks.left_out)}.")
    cut_by: dict[str, list[str]] = {}
    for result in results:
        if cut := ", ".join(f"{count} of {name}" for name, count in sorted(result.num_truncated.items())):
            cut_by.setdefault(cut, []).append(result.name)
    notes += [
        f"Prompts longer than the positions of {', '.join(names)}, cut from the left: {cut}."
        for cut, names in cut_by.items()
    ]
    if len({result.tokenizer for result in results}) > 1:
        notes.append("Tokenizers differ: the same text is other tokens; compare bits per byte, not perplexity.")
    return notes


def _versions(settings: EvaluationSettings) -> dict[str, str]:
    versions = installed_versions()
    if settings.tasks:
        versions["lm-eval"] = importlib.metadata.version("lm-eval")
    return versions
