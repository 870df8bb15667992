"""MUDD connections (MUDDFormer, arXiv 2502.12170) for stock MaxText."""

__version__ = "0.1.0"
