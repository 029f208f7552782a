"""Find what is wrong with a dataset, and repair it."""
