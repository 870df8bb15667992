"""Loads trained models in Python, computes their logits, and generates tokens."""
