"""The folder that an analysis writes."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..common.checkpoint_names import name_checkpoints
from ..common.output_folder import FolderKind, check_output_folder, staged
from ..common.progress import Progress
from ..common.provenance import recorded_parent
from ..common.settings import SettingsError
from ..common.text_files import find_files
from .analyze import analyze
from .report.write import JSON_FILE, REPORT_FILES, write_report
from .results import AnalysisReport
from .settings import AnalysisSettings


REPORT = FolderKind(
    "report", (JSON_FILE,), keys=frozenset({"format", "checkpoints", "domains"}), contents=frozenset(REPORT_FILES)
)
# What most reports need. Those of many layers with many experts take more, which is not known before.
REPORT_BYTES = 10_000_000


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
    check_output_folder(out, REPORT_BYTES, _read(checkpoints, settings), overwrite, REPORT)
    with staged(out, overwrite, REPORT) as folder:
        report = analyze(checkpoints, settings, progress=progress)
        write_report(report, folder)
    return report


def _read(checkpoints: Sequence[str], settings: AnalysisSettings) -> list[Path]:
    """Return the files and folders that an analysis reads."""
    models = [checkpoint.path for checkpoint in name_checkpoints(checkpoints)]
    recorded = [parent.folder for parent in map(recorded_parent, models) if parent]
    named = [settings.parent] if settings.parent else []
    found = [Path(path) for path in (*models, *recorded, *named, *settings.data)]
    for source in settings.data:
        # The analysis says what is wrong with a source, in its turn.
        with suppress(SettingsError):
            found += find_files(source, settings.split, whole_folders=True)
    return found
