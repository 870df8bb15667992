"""Measures what trained models compute inside, and draws the figures of the paper (`__main__`)."""
