"""Compares llama_ft with its peers on the same work: `python -m benchmarks.peers`."""
