"""Plan a run: choose settings from facts of the data and of the machine."""
