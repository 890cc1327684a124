"""Tokenizers, prompt templates and loss masks, data sets, collation."""
