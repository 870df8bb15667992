"""Trained models in Python: loading, logits, generation."""
