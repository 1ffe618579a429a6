"""The measures of an analysis, in the order of the report."""
