"""The training loop, what a detector adds to it, and the files and guards of a run."""
