"""Predicts a run's costs on a card: the real optimizer step on fake tensors, accounted for as on that card."""
