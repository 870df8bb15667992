"""Depth-wise aggregation, the one operation that MUDD connections add to a Transformer."""

from maxtext_mudd.kernels.api import depth_aggregate

__all__ = ["depth_aggregate"]
