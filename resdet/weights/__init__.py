"""Weights files: names and tensors, never modules."""
