"""Models of the built-in problems."""
