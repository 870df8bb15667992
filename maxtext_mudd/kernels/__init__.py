"""Depth-wise aggregation, the one operation that MUDD connections add to a Transformer."""

from maxtext_mudd.kernels.api import depth_aggregate
from maxtext_mudd.kernels.choice import DTYPES, interpretation, is_fused

__all__ = ["DTYPES", "depth_aggregate", "interpretation", "is_fused"]
