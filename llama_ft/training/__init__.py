"""The loop, the optimizer and its schedule."""
