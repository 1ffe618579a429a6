"""The report of an analysis: a page, pictures, and figures for machines."""
