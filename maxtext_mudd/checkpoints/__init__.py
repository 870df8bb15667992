"""Checkpoints in other layouts and of other projects."""
