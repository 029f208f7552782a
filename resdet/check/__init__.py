"""What is wrong with a dataset, found and repaired."""
