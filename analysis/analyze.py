"""The analysis: checkpoints and labelled text go in, a report comes out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..common.checkpoint_names import NamedCheckpoint, name_checkpoints
from ..common.checkpoints import (
    check_code,
    load_config,
    load_model,
    load_tokenizer,
    model_without_weights,
)
from ..common.devices import best_device
from ..common.labelled_text import Block
from ..common.moe_layers import MoeLayer, find_moe_layers
from ..common.progress import Progress
from ..common.provenance import RecordedParent, installed_versions, recorded_parent
from ..common.routing_pass import run_pass
from ..common.settings import SettingsError
from ..common.text_blocks import check_tokens, read_blocks
from ..common.tokenizers import tokens_digest
from .measures import MEASURES
from .measures.expert_weights import ExpertWeights, fits_parent
from .measures.measure import Subject
from .parent import DenseParent
from .results import AnalysisReport, CheckpointResult, Comparison
from .saturation import RecordedSelections, SelectionRecorder, compare, differences
from .settings import AnalysisSettings


_CAUTION = (
    "Router saturation matches experts by their number: it says something of checkpoints of one run, or of runs that "
    "began with the same experts and routers, and nothing of others."
)


@dataclass(frozen=True, eq=False)
class _OpenCheckpoint:
    """A checkpoint of which everything but the weights is loaded; its MoE layers have none."""

    checkpoint: NamedCheckpoint
    config: PreTrainedConfig
    layers: list[MoeLayer]
    tokenizer: PreTrainedTokenizerBase
    tokenizer_digest: str


def analyze(
    checkpoints: Sequence[str], settings: AnalysisSettings, *, progress: Progress | None = None
) -> AnalysisReport:
    """Return what the routers and experts of `checkpoints` do with the text that `settings` name.

    One checkpoint is in memory at a time. What can be checked without weights, is checked of all before the first.

    Args:
        checkpoints: folders or Hub ids; see `name_checkpoints` for names and revisions.

    Raises:
        SettingsError: if a checkpoint, the parent or the text cannot be read, there is no MoE layer that can be looked
            into, the parent that is named has no layer like any of them, or a router computes what is not finite.
    """
    progress = progress or Progress()
    opened = [_open(checkpoint, settings) for checkpoint in name_checkpoints(checkpoints)]
    if settings.parent is not None:
        _check_parent(settings.parent, opened)
    block_size = settings.block_size_for(
        {one.checkpoint.path: getattr(one.config, "max_position_embeddings", None) for one in opened}
    )
    texts: dict[str, dict[str, list[Block]]] = {}
    for one in opened:
        if one.tokenizer_digest not in texts:
            texts[one.tokenizer_digest] = read_blocks(settings, one.tokenizer, block_size)
        check_tokens(one.checkpoint.path, texts[one.tokenizer_digest], one.config)
    parents, notes = _parents(opened, settings)
    results, selections = [], {}
    for one in opened:
        text, parent = texts[one.tokenizer_digest], parents.get(one.checkpoint.name)
        result, selections[result.name] = _analyze_one(one, text, parent, settings, progress)
        results.append(result)
    comparisons, comparison_notes = _compare(selections)
    return AnalysisReport(
        settings={**asdict(settings), "data": list(settings.data), "block_size": block_size},
        domains=list(next(iter(texts.values()))),
        checkpoints=results,
        comparisons=comparisons,
        versions=installed_versions(),
        notes=notes,
        comparison_notes=comparison_notes,
    )


def _open(checkpoint: NamedCheckpoint, settings: AnalysisSettings) -> _OpenCheckpoint:
    path, revision = checkpoint.path, checkpoint.revision
    check_code(path, trust_remote_code=settings.trust_remote_code, revision=revision)
    config = load_config(path, revision=revision)
    with _about(checkpoint):
        layers = find_moe_layers(model_without_weights(path, config, revision=revision))
    tokenizer = load_tokenizer(path, revision=revision)
    return _OpenCheckpoint(checkpoint, config, layers, tokenizer, tokens_digest(tokenizer))


def _check_parent(name: str, opened: Sequence[_OpenCheckpoint]) -> None:
    parent = DenseParent(name)
    if not any(fits_parent(layer, parent) for one in opened for layer in one.layers):
        raise SettingsError(
            f"{name}: no layer has a feed-forward network of the shape of the experts; give --parent the dense "
            "checkpoint that they were copied from, or leave it out."
        )


def _parents(opened: Sequence[_OpenCheckpoint], settings: AnalysisSettings) -> tuple[dict[str, str], list[str]]:
    """Return the parent of each checkpoint that has one, by its name, and a note for each that has changed since."""
    if settings.parent is not None:
        return dict.fromkeys((one.checkpoint.name for one in opened), settings.parent), []
    changed_file = cache(RecordedParent.changed_file)  # checkpoints of a run have one parent
    parents, notes = {}, []
    for one in opened:
        recorded = recorded_parent(one.checkpoint.path)
        if recorded is None:
            continue
        changed = changed_file(recorded)
        if changed is None:
            parents[one.checkpoint.name] = recorded.folder
        else:
            notes.append(
                f"The experts of {one.checkpoint.name} are not compared with {recorded.folder}: its {changed} is not "
                "what it was at the conversion. --parent compares all the same."
            )
    return parents, notes


def _analyze_one(
    one: _OpenCheckpoint,
    domains: Mapping[str, Sequence[Block]],
    parent: str | None,
    settings: AnalysisSettings,
    progress: Progress,
) -> tuple[CheckpointResult, RecordedSelections]:
    """Return the figures of a checkpoint, and what comparing it with others takes; nothing of the model."""
    checkpoint = one.checkpoint
    model = load_model(
        checkpoint.path, one.config, dtype=settings.dtype, device=best_device(), revision=checkpoint.revision
    )
    layers = find_moe_layers(model)
    num_blocks = sum(map(len, domains.values()))
    with (
        torch.inference_mode(),
        _about(checkpoint),
        progress.task(f"Analyzing {checkpoint.name}", num_blocks, "blocks") as advance,
    ):
        subject = Subject(layers, list(domains), model.device, one.tokenizer, parent)
        recorder = SelectionRecorder(subject)
        measures = [measure(subject) for measure in MEASURES]
        run_pass(model, layers, domains, [*measures, recorder], settings.batch_size, advance)
        results = {measure.name: measure.result() for measure in measures}
        selections = recorder.selections()
    divergence = results[ExpertWeights.name].per_layer["parent_divergence"]
    result = CheckpointResult(
        name=checkpoint.name,
        path=checkpoint.path,
        model_type=one.config.model_type,
        num_experts=layers[0].num_experts,
        num_experts_per_tok=layers[0].num_experts_per_tok,
        layers=[layer.index for layer in layers],
        tokenizer=one.tokenizer_digest,
        num_tokens={name: sum(len(block["input_ids"]) for block in blocks) for name, blocks in domains.items()},
        measures=results,
        parent=None if all(value is None for value in divergence) else parent,
    )
    return result, selections


def _compare(selections: Mapping[str, RecordedSelections]) -> tuple[list[Comparison], list[str]]:
    """Return how each two checkpoints that can be compared differ, and notes on what they say and which cannot."""
    found = [compare(*first, *second) for first, second in combinations(selections.items(), 2)]
    comparisons = [comparison for comparison in found if comparison is not None]
    notes = [_CAUTION] if comparisons else []
    groups: list[list[str]] = []
    for name, recorded in selections.items():
        group = next((group for group in groups if not differences(selections[group[0]], recorded)), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    if len(groups) > 1:
        firsts = [selections[group[0]] for group in groups]
        differing = {what: None for first, second in combinations(firsts, 2) for what in differences(first, second)}
        notes.append(
            f"Not compared with each other token for token, as they differ in {' or '.join(differing)}: "
            f"{'; '.join(map(_listed, groups))}."
        )
    return comparisons, notes


def _listed(names: Sequence[str]) -> str:
    """Return e.g. `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


@contextmanager
def _about(checkpoint: NamedCheckpoint) -> Iterator[None]:
    """Name the checkpoint in errors that do not."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{checkpoint.path}: {error}") from error
