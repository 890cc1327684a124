"""Measures a run: memory by category at the peak, and the worst case of its data."""
