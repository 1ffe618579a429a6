"""Pruning: an upcycled checkpoint and text go in, one with fewer experts comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_upcycled_moe import UpcycledQwenMoeConfig

from ..common.checkpoints import load_model
from ..common.derived_checkpoint import DerivedCheckpoint, check_derived, written
from ..common.devices import best_device, free_memory
from ..common.expert_slices import num_expert_slices
from ..common.labelled_text import Block
from ..common.moe_layers import find_moe_layers
from ..common.moe_source import MoeSource
from ..common.progress import Progress
from ..common.provenance import with_step, write_provenance
from ..common.routing_pass import run_pass
from ..common.settings import SettingsError
from ..common.streaming.planned import into_shards
from ..common.text_blocks import check_tokens, load_text_tokenizer, read_blocks
from ..common.text_files import find_files
from ..common.text_settings import TextSettings
from ..model_cards.card import write_card
from ..model_cards.checkpoint import num_idle_parameters
from .alignment import check_assignment, merged_expert
from .choice import kept_experts, merge_groups, num_parts
from .losses import domains_in_common, measure_losses
from .results import LayerResult, Losses, PruneResult
from .scores import SCORES, LogitSimilarity
from .settings import EVALUATION_SPLIT, PruneSettings
from .tensors import PrunedLayer, fused_experts, pruned_config, pruned_tensors


@dataclass(frozen=True)
class _Text:
    """What the model reads.

    Args:
        calibration: blocks by domain.
        evaluation: blocks by domain; None if there is no loss to measure.
    """

    tokenizer: PreTrainedTokenizerBase
    calibration: dict[str, list[Block]]
    evaluation: dict[str, list[Block]] | None


def prune(
    source: MoeSource,
    settings: PruneSettings,
    out: str | Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PruneResult:
    """Write `source` with fewer experts in every MoE layer to `out`, whole or not at all, and return what it cost.

    The model is in memory for one pass over the text, and the result for another; the weights are streamed.

    Args:
        overwrite: whether a checkpoint in `out` may be replaced.
        dry_run: find out which experts would be kept, and write nothing.

    Raises:
        SettingsError: if the settings do not fit the checkpoint, the text cannot be read, a model computes what is not
            finite, or `out` cannot be written.
    """
    progress, out = progress or Progress(), Path(out)
    if settings.method == "merge":
        check_assignment()
    num_slices = num_expert_slices(source)
    parts = num_parts(source.config, num_slices, settings.num_experts)
    config = pruned_config(source.config, settings.num_experts, settings.num_experts_per_tok)
    first = PrunedLayer(range(settings.num_experts))
    # Which experts are kept changes no size.
    same_size = _derived(source, config, dict.fromkeys(config.moe_layers, first), settings)
    evaluation = _evaluation_text(source, settings)
    check_derived(same_size, out, _files(settings.calibration, evaluation), overwrite)
    text = _read_text(source, settings.calibration, evaluation)
    scores, similarity, before = _look_at(source, settings, text, progress)
    results = _choose(config.moe_layers, scores, similarity, settings.num_experts, parts, num_slices)
    result = PruneResult(
        folder=None if dry_run else out,
        settings=_settings_as_json(settings, evaluation, source.config, config),
        layers=results,
        calibration_tokens=_num_tokens(text.calibration),
        num_bytes=same_size.num_bytes,
        total_parameters=same_size.total_parameters,
        active_parameters=same_size.total_parameters - _num_idle_parameters(same_size),
        before=before,
        notes=_notes(text),
    )
    if dry_run:
        return result
    derived = _derived(source, config, _pruned_layers(source, results, progress), settings)
    with written(derived, out, overwrite, progress) as folder:
        if text.evaluation is not None:
            result.after = _loss_of(folder, str(out), config, settings, text, progress)
        step = with_step(source.provenance, "prune", source=source.record, **result.facts())
        write_provenance(folder, step)
        write_card(folder, source.folder)
    return result


def _derived(
    source: MoeSource, config: UpcycledQwenMoeConfig, layers: Mapping[int, PrunedLayer], settings: PruneSettings
) -> DerivedCheckpoint:
    shards = into_shards(pruned_tensors(source, config, layers), settings.max_shard_bytes)
    return DerivedCheckpoint(source, config, shards)


def _evaluation_text(source: MoeSource, settings: PruneSettings) -> TextSettings | None:
    """Return the text that the loss is measured on; None if the model predicts none.

    Raises:
        SettingsError: if there is some all the same.
    """
    if source.config.architectures[0].endswith("ForCausalLM"):
        return settings.evaluation
    for flag, is_given in (
        ("--eval-data", bool(settings.evaluation_data)),
        ("--eval-split", settings.evaluation_split != EVALUATION_SPLIT),
    ):
        if is_given:
            raise SettingsError(f"{source.name}: is a classifier, which predicts no text; leave {flag} out.")
    return None


def _files(*texts: TextSettings | None) -> list[Path]:
    """Return the files that are read beside the checkpoint."""
    return [
        file
        for text in filter(None, texts)
        for name in text.data
        for file in find_files(name, text.split, whole_folders=True)
    ]


def _read_text(source: MoeSource, calibration: TextSettings, evaluation: TextSettings | None) -> _Text:
    block_size = calibration.block_size_for({source.name: source.config.max_position_embeddings})
    tokenizer = load_text_tokenizer(source)
    domains = [text and read_blocks(text, tokenizer, block_size) for text in (calibration, evaluation)]
    for found in filter(None, domains):
        check_tokens(source.name, found, source.config)
    return _Text(tokenizer, *domains)


def _notes(text: _Text) -> list[str]:
    if text.evaluation is None:
        return ["The checkpoint is a classifier, which predicts no text: the loss is not measured."]
    if same := domains_in_common(text.calibration, text.evaluation):
        return [
            f"The loss on {', '.join(same)} is on text that the scores come from too, and so says little of other "
            "text; give folders or datasets with a split for each, or --eval-data."
        ]
    return []


def _look_at(
    source: MoeSource, settings: PruneSettings, text: _Text, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor | None, Losses | None]:
    """Return scores [L, C], for `merge` similarities [L, C, C], and the loss; the model is gone afterwards."""
    calibration, before, similarity = settings.calibration, None, None
    model = _load(source.folder, source.config, settings)
    if text.evaluation is not None:
        before = measure_losses(source.name, model, text.tokenizer, text.evaluation, calibration.batch_size, progress)
    layers = find_moe_layers(model)
    observers = [SCORES[settings.method](model, layers)]
    if settings.method == "merge":
        observers.append(LogitSimilarity(model, layers))
    num_blocks = sum(map(len, text.calibration.values()))
    with progress.task("Scoring experts", num_blocks, "blocks") as advance, observers[0].attached():
        run_pass(model, layers, text.calibration, observers, calibration.batch_size, advance)
    scores, *others = [observer.scores() for observer in observers]
    similarity = others[0] if others else None
    if not scores.isfinite().all():
        raise SettingsError(f"{source.name}: the outputs of its experts are not finite; try --dtype float32.")
    del model, layers, observers
    free_memory()
    return scores, similarity, before


def _loss_of(
    folder: Path, name: str, config: PreTrainedConfig, settings: PruneSettings, text: _Text, progress: Progress
) -> Losses:
    model = _load(folder, config, settings)
    return measure_losses(name, model, text.tokenizer, text.evaluation, settings.calibration.batch_size, progress)


def _load(folder: Path, config: PreTrainedConfig, settings: PruneSettings) -> PreTrainedModel:
    # By the code of this package, as all of it reads the checkpoint so.
    return load_model(str(folder), config, dtype=settings.calibration.dtype, device=best_device(), own_code=False)


def _choose(
    indices: Sequence[int],
    scores: torch.Tensor,
    similarity: torch.Tensor | None,
    num_experts: int,
    parts: int,
    num_slices: int,
) -> list[LayerResult]:
    results = []
    for number, layer_idx in enumerate(indices):
        kept = kept_experts(scores[number], num_experts, parts, num_slices)
        groups = None if similarity is None else merge_groups(similarity[number], kept, parts, num_slices)
        results.append(LayerResult(layer_idx, scores[number].tolist(), kept, groups))
    return results


def _pruned_layers(source: MoeSource, results: Sequence[LayerResult], progress: Progress) -> dict[int, PrunedLayer]:
    """Return what becomes of each MoE layer; for `merge` with its experts aligned, a layer at a time."""
    if all(result.groups is None for result in results):
        return {result.index: PrunedLayer(result.kept) for result in results}
    layers = {}
    with progress.task("Aligning experts", len(results), "layers") as advance:
        for result in results:
            experts, frequencies = fused_experts(source, result.index), torch.tensor(result.scores).double()
            merged = {group[0]: merged_expert(experts, list(group), frequencies) for group in result.groups}
            layers[result.index] = PrunedLayer(
                result.kept, {expert: made for expert, made in merged.items() if made is not None}
            )
            advance(1)
    return layers


def _num_idle_parameters(derived: DerivedCheckpoint) -> int:
    tensors = [tensor for shard in derived.shards for tensor in shard.tensors if tensor.is_parameter]
    return num_idle_parameters({tensor.name: tensor.shape for tensor in tensors}, derived.config.to_dict())


def _num_tokens(domains: Mapping[str, Sequence[Block]]) -> dict[str, int]:
    return {name: sum(len(block["input_ids"]) for block in blocks) for name, blocks in domains.items()}


def _settings_as_json(
    settings: PruneSettings,
    evaluation: TextSettings | None,
    before: UpcycledQwenMoeConfig,
    after: UpcycledQwenMoeConfig,
) -> dict[str, Any]:
    return {
        "method": settings.method,
        "num_experts": {"before": before.num_experts, "after": after.num_experts},
        "num_experts_per_tok": {"before": before.num_experts_per_tok, "after": after.num_experts_per_tok},
        "text": _text_as_json(settings.calibration),
        "evaluation_text": None if evaluation is None else _text_as_json(evaluation),
    }


def _text_as_json(text: TextSettings) -> dict[str, Any]:
    return {**asdict(text), "data": list(text.data)}
