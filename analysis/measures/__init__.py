"""The measures of an analysis, in the order of the report."""

from .measure import Measure, Subject


MEASURES: tuple[type[Measure], ...] = ()

__all__ = ["MEASURES", "Measure", "Subject"]
