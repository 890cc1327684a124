"""Scripts that made the built-in data and model; not part of the package."""
