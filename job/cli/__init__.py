"""Command line: parse, validate, call."""
