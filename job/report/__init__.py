"""The report of a run: a page, figures, tables."""
