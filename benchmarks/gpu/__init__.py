"""Checks llama_ft on a GPU in a few minutes: `python -m benchmarks.gpu`."""
