"""The export: an upcycled checkpoint goes in, one of a stock architecture comes out, which computes the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.derived_checkpoint import DerivedCheckpoint, check_derived, written
from ..common.moe_source import MoeSource
from ..common.progress import Progress
from ..common.provenance import with_step, write_provenance
from ..common.streaming.planned import into_shards
from ..model_cards.card import write_card
from .config import declare_num_experts, native_config
from .notes import export_notes
from .obstacles import Choice, choose_target
from .readers import vllm_model_impl
from .tensors import native_tensors
from .tokenizer import write_tokenizer_pipeline


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write.

    Args:
        choice: the architecture, and why it is this one.
        notes: what someone should know of it.
        vllm_model_impl: the `--model-impl` with which vLLM computes the same, None if it does with neither.
        derived: the checkpoint.
    """

    choice: Choice
    notes: tuple[str, ...]
    vllm_model_impl: str | None
    derived: DerivedCheckpoint

    @property
    def source(self) -> MoeSource:
        """The upcycled checkpoint."""
        return self.derived.source

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        return {
            "source": self.source.record,
            **self._settled(),
            "total_parameters": self.derived.total_parameters,
            "num_bytes": self.derived.num_bytes,
            "shards": [{"file": shard.file_name, "num_bytes": shard.num_bytes} for shard in self.derived.shards],
        }

    def provenance(self) -> dict[str, Any]:
        """Return that of the source with this export as the last step."""
        return with_step(self.source.provenance, "export", source=self.source.record, **self._settled())

    def _settled(self) -> dict[str, Any]:
        return {
            "target": self.choice.target.name,
            "architecture": self.derived.config.architectures[0],
            "reason": self.choice.reason,
            "rejected": {name: list(obstacles) for name, obstacles in self.choice.rejected.items()},
            "notes": list(self.notes),
            "vllm_model_impl": self.vllm_model_impl,
        }


def plan_export(source: MoeSource, to: str, max_shard_bytes: int) -> ExportPlan:
    """Return the plan for exporting `source`; of its weights, only biases are read.

    Args:
        to: name of the architecture, or `auto` for the first that is exact.

    Raises:
        SettingsError: if that is none, or it does not compute exactly what `source` does.
    """
    choice = choose_target(source, to)
    shards = into_shards(native_tensors(source, choice.target), max_shard_bytes)
    derived = DerivedCheckpoint(source, native_config(source.config, choice.target), shards)
    notes, model_impl = export_notes(source, choice.target), vllm_model_impl(source, choice.target)
    return ExportPlan(choice, notes, model_impl, derived)


def export(plan: ExportPlan, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> None:
    """Write what `plan` says to the folder `out`, all or nothing; the same source gives the same bytes.

    Raises:
        SettingsError: if `out` cannot be written as asked; nothing is written then.
        OSError: if writing fails; nothing is left then.
    """
    check_derived(plan.derived, out, (), overwrite)
    progress, target = progress or Progress(), plan.choice.target
    with written(plan.derived, out, overwrite, progress) as folder:
        declare_num_experts(folder, plan.source.config, target)
        if not target.declares_tokenizer:
            write_tokenizer_pipeline(plan.source, folder, progress)
        write_provenance(folder, plan.provenance())
        write_card(folder, plan.source.folder)
