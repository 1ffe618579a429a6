"""The merge: a Mixture-of-Experts checkpoint goes in, a dense one comes out."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..common.derived_checkpoint import DerivedCheckpoint, check_derived, written
from ..common.files import replacing
from ..common.moe_source import MoeSource
from ..common.progress import Progress
from ..common.provenance import with_step, write_provenance
from ..common.settings import SettingsError
from ..common.streaming.planned import into_shards
from ..model_cards.card import write_card
from .coefficients import MergeCoefficients, load_coefficients
from .config import dense_config
from .layout import ExpertLayout, expert_layout
from .saved import check_saved, files_read
from .settings import MergeSettings
from .tensors import dense_tensors


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write.

    Args:
        settings: what was asked for.
        coefficients: of every layer.
        num_tokens: of the text that they were measured on, by domain; None without.
        derived: the dense checkpoint.
    """

    settings: MergeSettings
    coefficients: MergeCoefficients
    num_tokens: dict[str, int] | None
    derived: DerivedCheckpoint

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        derived = self.derived
        return {
            "source": self._source(),
            **self._settled(),
            "architecture": derived.config.architectures[0],
            "num_bytes": derived.num_bytes,
            "shards": [{"file": shard.file_name, "num_bytes": shard.num_bytes} for shard in derived.shards],
        }

    def provenance(self) -> dict[str, Any]:
        """Return that of the source with this merge as the last step."""
        return with_step(self.derived.source.provenance, "merge", source=self._source(), **self._settled())

    def _source(self) -> dict[str, Any]:
        return self.derived.source.record

    def _settled(self) -> dict[str, Any]:
        settled: dict[str, Any] = {
            "method": self.settings.method,
            "total_parameters": self.derived.total_parameters,
            "coefficients": self.coefficients.to_dict(),
        }
        if self.settings.text is not None:
            settled["text"] = {**asdict(self.settings.text), "data": list(self.settings.text.data)}
            settled["num_tokens"] = self.num_tokens
        return settled


def plan_merge(
    source: MoeSource,
    settings: MergeSettings,
    out: Path,
    max_shard_bytes: int,
    *,
    save_coefficients: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergePlan:
    """Return the plan for merging `source` into `out`; only for `usage` are weights read, when all else is checked.

    Args:
        save_coefficients: file that `merge` shall write the coefficients to as well.
        overwrite: whether a checkpoint in `out` may be replaced, and a file of coefficients.

    Raises:
        SettingsError: if the experts, settings, coefficients, text or output do not fit.
    """
    progress = progress or Progress()
    layout = expert_layout(source)
    if settings.method == "shared" and not layout.has_shared_expert:
        raise SettingsError(f"{source.name}: has no shared expert; choose another method.")

    def derived(coefficients: MergeCoefficients) -> DerivedCheckpoint:
        tensors = dense_tensors(source, layout, coefficients)
        return DerivedCheckpoint(
            source, dense_config(source.config, layout.width), into_shards(tensors, max_shard_bytes)
        )

    if save_coefficients is not None:
        check_saved(save_coefficients, source, settings, out, overwrite)
    # Whatever the coefficients, the result is of one size.
    check_derived(derived(average_coefficients(layout)), out, files_read(settings), overwrite)
    coefficients, num_tokens = _coefficients(source, layout, settings, progress)
    if _averages(layout, coefficients):
        _warn(source, layout, progress)
    return MergePlan(settings, coefficients, num_tokens, derived(coefficients))


def merge(
    plan: MergePlan,
    out: Path,
    *,
    save_coefficients: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write what `plan` says to the folder `out`, all or nothing; the same source and coefficients, the same bytes.

    Args:
        save_coefficients: file to write the coefficients to as well, as the plan was made for; it replaces one that is
            there.

    Raises:
        SettingsError: if `out` may not be replaced, or weights are not finite; nothing is left then.
        OSError: if writing fails; nothing is left then.
    """
    with ExitStack() as stack:
        if save_coefficients is not None:
            plan.coefficients.save(stack.enter_context(replacing(save_coefficients)))
        folder = stack.enter_context(written(plan.derived, out, overwrite, progress or Progress()))
        write_provenance(folder, plan.provenance())
        write_card(folder, plan.derived.source.folder)


def average_coefficients(layout: ExpertLayout) -> MergeCoefficients:
    """Return coefficients for which all FFNs count alike, the shared expert as one of them."""
    routed = dict.fromkeys(layout.moe_layers, (1 / layout.num_experts,) * layout.num_experts)
    shared = dict.fromkeys(layout.moe_layers, 1 / (layout.num_copies + 1))
    return MergeCoefficients.alike(routed, shared if layout.has_shared_expert else None)


def shared_coefficients(layout: ExpertLayout) -> MergeCoefficients:
    """Return coefficients for which only the shared expert counts."""
    average = average_coefficients(layout)
    return MergeCoefficients(average.layers, dict.fromkeys(layout.moe_layers, 1.0))


def _coefficients(
    source: MoeSource, layout: ExpertLayout, settings: MergeSettings, progress: Progress
) -> tuple[MergeCoefficients, dict[str, int] | None]:
    if settings.method == "usage":
        # Imported here: what it needs to read text takes a second, and the other methods read none.
        from .usage import measure_coefficients

        return measure_coefficients(source, layout, settings.text, progress)
    if settings.method == "coefficients":
        path = settings.coefficients
        loaded = load_coefficients(path, layout.moe_layers, layout.num_experts, layout.has_shared_expert)
        _check_slices(path, layout, loaded)
        return loaded, None
    return (average_coefficients if settings.method == "average" else shared_coefficients)(layout), None


def _check_slices(path: Path, layout: ExpertLayout, coefficients: MergeCoefficients) -> None:
    """Check that every slice of the FFN has an expert that counts."""
    for layer_idx, matrices in coefficients.layers.items():
        for matrix, values in matrices.items():
            for number in range(layout.num_slices):
                experts = layout.slice_of(number)
                if not any(values[expert] for expert in experts):
                    raise SettingsError(
                        f"{path}: layer {layer_idx}, {matrix}: experts {experts[0]} to {experts[-1]} are all "
                        "copies of one slice of the FFN, and all zero; let one count."
                    )


def _averages(layout: ExpertLayout, coefficients: MergeCoefficients) -> bool:
    """Return whether more than one copy of an FFN, or of a slice of it, counts anywhere, but for shared experts."""
    return any(
        sum(values[expert] > 0 for expert in layout.slice_of(number)) > 1
        for layer_idx, matrices in coefficients.layers.items()
        if coefficients.shared is None or coefficients.shared[layer_idx] < 1
        for values in matrices.values()
        for number in range(layout.num_slices)
    )


def _warn(source: MoeSource, layout: ExpertLayout, progress: Progress) -> None:
    num_free = source.config.num_routed_experts - source.config.num_experts
    if num_free:
        progress.warn(
            f"{source.name}: its {num_free} experts without computation have no place in a dense FFN and are left out."
        )
    if layout.is_from_scratch:
        progress.warn(
            f"{source.name}: its experts started at random, so their neurons do not correspond and their average "
            "means little; `shared` or one expert alone (coefficients) keeps what was learned."
        )
