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
from ..common.streaming.planned import into_shards
from ..model_cards.card import write_card
from .choosing import Choice, check_method, choose, warn_of_average
from .coefficients import MergeCoefficients, average_coefficients
from .config import dense_config
from .layout import expert_layout
from .learned_files import LEARNED_COEFFICIENTS, learning_facts, write_fit
from .saved import check_saved, files_read
from .settings import MergeSettings
from .tensors import dense_tensors


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write.

    Args:
        settings: what was asked for.
        chosen: the coefficients of every layer, and what they come from.
        derived: the dense checkpoint.
    """

    settings: MergeSettings
    chosen: Choice
    derived: DerivedCheckpoint

    @property
    def coefficients(self) -> MergeCoefficients:
        """Coefficients of every layer."""
        return self.chosen.coefficients

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        derived = self.derived
        return {
            "source": self._source(),
            **self._settled(),
            "coefficients_are_initial": self.settings.method == "learned" and self.chosen.fit is None,
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
            settled["num_tokens"] = self.chosen.num_tokens
        return settled | learning_facts(self.settings.learn, self.chosen.fit)


def plan_merge(
    source: MoeSource,
    settings: MergeSettings,
    out: Path,
    max_shard_bytes: int,
    *,
    save_coefficients: Path | None = None,
    overwrite: bool = False,
    learn: bool = True,
    progress: Progress | None = None,
) -> MergePlan:
    """Return the plan for merging `source` into `out`.

    Only for `usage` and `learned` are weights read, when all that can be is checked.

    Args:
        save_coefficients: file that `merge` shall write the coefficients to as well.
        overwrite: whether a checkpoint in `out` may be replaced, and a file of coefficients.
        learn: whether `learned` learns; if not, the plan has the coefficients that it would start from.

    Raises:
        SettingsError: if the experts, settings, coefficients, data or output do not fit.
    """
    progress = progress or Progress()
    layout = expert_layout(source)
    check_method(source, layout, settings)

    def derived(coefficients: MergeCoefficients) -> DerivedCheckpoint:
        tensors = dense_tensors(source, layout, coefficients)
        return DerivedCheckpoint(
            source, dense_config(source.config, layout.width), into_shards(tensors, max_shard_bytes)
        )

    if save_coefficients is not None:
        check_saved(save_coefficients, [source], settings, out, overwrite)
    # Whatever the coefficients, the result is of one size.
    check_derived(derived(average_coefficients(layout)), out, files_read(settings), overwrite)
    chosen = choose(source, layout, settings, learn, progress)
    warn_of_average(source, layout, chosen.coefficients, progress)
    return MergePlan(settings, chosen, derived(chosen.coefficients))


def merge(
    plan: MergePlan,
    out: Path,
    *,
    save_coefficients: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write what `plan` says to the folder `out`, all or nothing; the same source and coefficients, the same bytes.

    Beside learned weights lie `LEARNED_COEFFICIENTS`, and how they were learned.

    Args:
        save_coefficients: file to write the coefficients to as well, as the plan was made for; it replaces one that is
            there.

    Raises:
        SettingsError: if `out` may not be replaced, or weights are not finite; nothing is left then.
        OSError: if writing fails; nothing is left then.
    """
    progress = progress or Progress()
    with ExitStack() as stack:
        if save_coefficients is not None:
            plan.coefficients.save(stack.enter_context(replacing(save_coefficients)))
        folder = stack.enter_context(written(plan.derived, out, overwrite, progress))
        if plan.chosen.fit is not None:
            plan.coefficients.save(folder / LEARNED_COEFFICIENTS)
            write_fit(plan.chosen.fit, folder, progress)
        write_provenance(folder, plan.provenance())
        write_card(folder, plan.derived.source.folder)
