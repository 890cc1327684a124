"""What a GPU owner can check of llama_ft in a few minutes: `python -m benchmarks.gpu`."""
