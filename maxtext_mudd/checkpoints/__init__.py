"""Checkpoints: reading and writing them, and converting between layouts and the formats of other projects."""
