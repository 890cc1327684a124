"""The training loop, the optimizer and its schedule."""
