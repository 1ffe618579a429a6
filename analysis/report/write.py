"""The folder of a report: the page, the numbers, and the main charts as PNG."""

from pathlib import Path

from ...common.pictures import INSTALL, can_draw
from ..results import AnalysisReport
from .json_file import format_json, rounded
from .page import render_page
from .pictures import PICTURE_FILES, write_pictures


JSON_FILE = "report.json"
PAGE_FILE = "report.html"
# All that may be in the folder.
REPORT_FILES = (JSON_FILE, PAGE_FILE, *PICTURE_FILES)


def write_report(report: AnalysisReport, folder: Path) -> None:
    """Write `report` into `folder`, which exists: `report.json`, `report.html`, and PNGs if Matplotlib is installed.

    Raises:
        OSError: if it cannot be written.
    """
    content = rounded(report.to_dict())
    (folder / JSON_FILE).write_text(format_json(content) + "\n", encoding="utf-8")
    # Page and pictures show what the file says, without numbers that are none.
    report = AnalysisReport.from_dict(content)
    if not can_draw():
        report.notes.append(f"There are no pictures beside this page: Matplotlib is not installed ({INSTALL}).")
    (folder / PAGE_FILE).write_text(render_page(report), encoding="utf-8")
    if can_draw():
        write_pictures(report, folder)
