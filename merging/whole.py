"""The merge of whole checkpoints: several of one architecture go in, one comes out.

Dimensions: K checkpoints.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.checkpoints import load_model
from ..common.derived_checkpoint import DerivedCheckpoint, check_checkpoint_folder
from ..common.devices import best_device
from ..common.files import replacing, write_text
from ..common.learned_merge.checkpoints import CheckpointSeries, write_merged
from ..common.learned_merge.coefficients import SoftmaxCoefficients
from ..common.progress import Progress
from ..common.settings import SettingsError, check_keys
from ..model_cards.card import write_card
from ..model_cards.terms import read_terms
from .coefficients import COEFFICIENTS_FORMAT, GROUP_KEYS, read_object
from .learned_files import LEARNED_COEFFICIENTS, learning_facts, write_fit
from .saved import check_saved, files_read
from .settings import CHECKPOINT_METHODS, CHECKPOINT_PARTS, LearnSettings, MergeSettings


if TYPE_CHECKING:
    from ..preference.fit_record import FitRecord

# What the checkpoints count [K], by group of weights; `model` is all weights.
GroupCoefficients = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class WholePlan:
    """What a merge of whole checkpoints will write.

    Args:
        series: the checkpoints.
        coefficients: [K] by group of weights.
        fit: how they were learned; None if they were not.
        derived: the merged checkpoint.
    """

    settings: MergeSettings
    series: CheckpointSeries
    coefficients: GroupCoefficients
    fit: "FitRecord | None"
    derived: DerivedCheckpoint
    max_shard_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        derived = self.derived
        return {
            "sources": [source.record for source in self.series.sources],
            **self.facts(),
            "total_parameters": derived.total_parameters,
            "coefficients": _to_dict(self.coefficients),
            "coefficients_are_initial": self.settings.method == "learned" and self.fit is None,
            "architecture": derived.config.architectures[0],
            "num_bytes": derived.num_bytes,
            "shards": [{"file": shard.file_name, "num_bytes": shard.num_bytes} for shard in derived.shards],
        }

    def facts(self) -> dict[str, Any]:
        """Return what provenance says of where the coefficients come from."""
        return {"method": self.settings.method, **learning_facts(self.settings.learn, self.fit)}


def plan_whole(
    series: CheckpointSeries,
    settings: MergeSettings,
    out: Path,
    max_shard_bytes: int,
    *,
    save_coefficients: Path | None = None,
    overwrite: bool = False,
    learn: bool = True,
    progress: Progress | None = None,
) -> WholePlan:
    """Return the plan for merging the checkpoints of `series` into `out`; see [`merge.plan_merge`].

    Raises:
        SettingsError: if the checkpoints, settings, coefficients, data or output do not fit.
    """
    if settings.method not in CHECKPOINT_METHODS:
        raise SettingsError(
            f"--method {settings.method} merges experts by their routers; choose one of "
            f"{', '.join(CHECKPOINT_METHODS)} for whole checkpoints."
        )
    _check_apart(series)
    if settings.learn is not None:
        _check_learning(series, settings.learn)
    if save_coefficients is not None:
        check_saved(save_coefficients, series.sources, settings, out, overwrite)
    uniform = {"model": [1 / len(series.sources)] * len(series.sources)}
    folders = {source.name: source.folder for source in series.sources}
    num_bytes = series.derived(uniform, max_shard_bytes).num_bytes
    check_checkpoint_folder(out, num_bytes, folders, files_read(settings), overwrite)
    fit = None
    if settings.method == "learned":
        coefficients, fit = _learned(series, settings.learn, learn, progress or Progress())
    elif settings.method == "coefficients":
        coefficients = _load(settings.coefficients)
    else:
        coefficients = uniform
    try:
        derived = series.derived(coefficients, max_shard_bytes)
    except SettingsError as error:
        where = f"{settings.coefficients}: " if settings.method == "coefficients" else ""
        raise SettingsError(f"{where}{error}") from None
    return WholePlan(settings, series, coefficients, fit, derived, max_shard_bytes)


def merge_whole(
    plan: WholePlan,
    out: Path,
    *,
    save_coefficients: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write what `plan` says to the folder `out`, all or nothing; see [`merge.merge`].

    Raises:
        SettingsError: if `out` may not be replaced, or weights are not finite; nothing is left then.
        OSError: if writing fails; nothing is left then.
    """
    progress = progress or Progress()

    def finish(folder: Path, source: Path) -> None:
        if plan.fit is not None:
            _save(plan.coefficients, folder / LEARNED_COEFFICIENTS)
            write_fit(plan.fit, folder, progress)
        write_card(folder, source)

    with ExitStack() as stack:
        if save_coefficients is not None:
            _save(plan.coefficients, stack.enter_context(replacing(save_coefficients)))
        write_merged(
            plan.series,
            plan.coefficients,
            out,
            max_shard_bytes=plan.max_shard_bytes,
            overwrite=overwrite,
            progress=progress,
            finish=finish,
            source_terms=[read_terms(source.folder) for source in plan.series.sources],
            **plan.facts(),
        )


def _check_apart(series: CheckpointSeries) -> None:
    names: dict[Path, str] = {}
    for source in series.sources:
        folder = source.folder.resolve()
        if folder in names:
            raise SettingsError(f"{source.name}: is the same checkpoint as {names[folder]}; give each one once.")
        names[folder] = source.name


def _check_learning(series: CheckpointSeries, settings: LearnSettings) -> None:
    # Imported here, like what learns below: it takes seconds, and the other methods have no use for it.
    from .lessons import check_loss

    check_loss(series.sources[0], settings)
    if settings.per not in CHECKPOINT_PARTS:
        raise SettingsError(
            f"per={settings.per!r}: choose one of {', '.join(CHECKPOINT_PARTS)} for whole checkpoints."
        )
    if settings.initial != "uniform":
        raise SettingsError(f"initial={settings.initial!r} is about experts; whole checkpoints start alike.")
    if settings.shared_expert_weight is not None:
        raise SettingsError("shared_expert_weight is about experts; leave it out for whole checkpoints.")


def _learned(
    series: CheckpointSeries, settings: LearnSettings, learn: bool, progress: Progress
) -> "tuple[GroupCoefficients, FitRecord | None]":
    """Return learned coefficients, or without `learn` those that they start from."""
    from .learning import fit
    from .lessons import read_lesson

    first = series.sources[0]
    lesson = read_lesson(first, settings)
    groups = series.groups([1 / len(series.sources)] * len(series.sources), settings.per)
    if not learn:
        return {group.name: _shares(group.coefficients) for group in groups}, None
    # Its weights are those of the first checkpoint until the merge makes them.
    model = load_model(str(first.folder), first.config, dtype=torch.float32, device=best_device(), own_code=False)
    record = fit(model, groups, settings, lesson, progress)
    return {group.name: _shares(group.coefficients) for group in groups}, record


def _shares(coefficients: SoftmaxCoefficients) -> list[float]:
    return coefficients().tolist()


def _to_dict(coefficients: GroupCoefficients) -> dict[str, Any]:
    return {
        "format": COEFFICIENTS_FORMAT,
        "groups": {name: list(values) for name, values in coefficients.items()},
    }


def _save(coefficients: GroupCoefficients, path: Path) -> None:
    write_text(path, json.dumps(_to_dict(coefficients), indent=2) + "\n")


def _load(path: Path) -> GroupCoefficients:
    """Return the groups in the JSON file `path`; what they must be, the checkpoints know."""
    raw = read_object(path)
    check_keys(raw, GROUP_KEYS, str(path))
    groups = raw.get("groups")
    is_lists = isinstance(groups, dict) and all(
        isinstance(values, list) and all(type(value) in (int, float) for value in values) for values in groups.values()
    )
    if not is_lists:
        raise SettingsError(f"{path}: groups: expected lists of numbers by the names of groups; see docs/merge.md.")
    return groups
