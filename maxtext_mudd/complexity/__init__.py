"""Counts what a model costs in parameters, FLOPs and memory, exactly and by the formulas of the paper."""
