"""Measurements of this package against what it replaces: each as a function that gives plain data."""
