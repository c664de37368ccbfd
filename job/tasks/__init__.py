"""Tasks other than classification: built-in ones by name, and the user's as ``module:factory``."""
