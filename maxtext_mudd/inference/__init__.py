"""Uses a trained model in Python: loads it, computes logits, and generates tokens."""
