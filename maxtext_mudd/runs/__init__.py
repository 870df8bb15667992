"""Training runs, apart from the model: checks before the start, the data, the console, the lock and how a run ends."""
