"""A model, and its training under a strategy."""
