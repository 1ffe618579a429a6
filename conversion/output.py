"""Whether the result of a conversion may be written where it is asked for."""

from pathlib import Path

from ..common.derived_checkpoint import check_checkpoint_folder
from .plan import ConversionPlan


def check_output(plan: ConversionPlan, out: Path, overwrite: bool) -> None:
    """Check, before anything is written, that `out` is free to use and its disk large enough.

    Raises:
        OutputError: if not.
    """
    sources = {f"the dense model {source.name}": source.folder for source in plan.sources}
    check_checkpoint_folder(out, plan.num_bytes, sources, plan.calibration_files, overwrite)
