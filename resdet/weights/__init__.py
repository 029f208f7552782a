"""Weights files: where they come from, how they are read safely, how other libraries name the same tensors."""
