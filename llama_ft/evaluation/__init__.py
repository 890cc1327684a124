"""Evaluates a model: perplexity of a text and of responses, exact match of answers."""
