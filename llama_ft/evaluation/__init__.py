"""How good a model is: perplexity of a text and of responses, exact match of answers."""
