"""The LLaMA decoder and its weights."""
