"""What an analysis can be asked for. Imports nothing heavy: the command line shows the defaults."""

from dataclasses import dataclass

from ..common.text_settings import TextSettings


@dataclass(frozen=True)
class AnalysisSettings(TextSettings):
    """The text of an analysis, and how it runs.

    Args:
        parent: dense checkpoint to compare the experts with; by default the one that `upcycling.json` names, if it is
            a folder here.
        trust_remote_code: whether the code of a Hub checkpoint may run.
    """

    parent: str | None = None
    trust_remote_code: bool = False
