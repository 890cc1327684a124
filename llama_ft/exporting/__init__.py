"""Writing a model for others: another format, an adapter merged into it, other dtypes."""
