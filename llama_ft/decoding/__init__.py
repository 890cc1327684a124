"""Generates text: the growing context, and the ways to choose the next token."""
