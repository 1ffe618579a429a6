"""The report of an analysis: a page, pictures, and figures for machines."""

from .write import write_report


__all__ = ["write_report"]
