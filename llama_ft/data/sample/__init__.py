"""The built-in instruction data set, and the script that wrote it and tiny's tokenizer."""
