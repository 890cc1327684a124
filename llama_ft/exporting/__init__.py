"""Exports a model to other formats or dtypes, optionally with an adapter merged into it."""
