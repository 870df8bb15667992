"""Reads and writes the released models in Hugging Face folders."""
