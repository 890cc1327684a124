"""Tokenizer, prompt template and label mask, data sets, collation."""
