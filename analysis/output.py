"""The folder that an analysis writes."""

from collections.abc import Sequence
from pathlib import Path

from ..common.checkpoint_names import name_checkpoints
from ..common.output_folder import FolderKind, check_output_folder, staged
from ..common.progress import Progress
from .analyze import analyze
from .report.write import JSON_FILE, write_report
from .results import AnalysisReport
from .settings import AnalysisSettings


REPORT = FolderKind("report", (JSON_FILE,))
# Of the largest that is likely: some checkpoints of 48 layers and 128 experts.
REPORT_BYTES = 100_000_000


def write_analysis(
    checkpoints: Sequence[str],
    settings: AnalysisSettings,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AnalysisReport:
    """Analyze `checkpoints` as [`analyze`] does, and write the report to the folder `out`, whole or not at all.

    Args:
        overwrite: whether a report in `out` may be replaced.

    Raises:
        SettingsError: if `out` cannot be written, and as `analyze` does.
    """
    out = Path(out)
    kept = [Path(checkpoint.path) for checkpoint in name_checkpoints(checkpoints)]
    kept += [Path(source) for source in (*settings.data, settings.parent) if source is not None]
    check_output_folder(out, REPORT_BYTES, kept, overwrite, REPORT)
    with staged(out, overwrite, REPORT) as folder:
        report = analyze(checkpoints, settings, progress=progress)
        write_report(report, folder)
    return report
