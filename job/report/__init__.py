"""Report of a run: page, figures, tables."""
