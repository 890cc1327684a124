"""What a run would cost on a card: the real optimizer step on fake tensors, accounted as that card would."""
