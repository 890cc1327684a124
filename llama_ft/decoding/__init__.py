"""Generating text: the context that grows, and the ways to choose what comes next."""
