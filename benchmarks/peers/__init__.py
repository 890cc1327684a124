"""llama_ft beside its peers, on the same work: `python -m benchmarks.peers`."""
