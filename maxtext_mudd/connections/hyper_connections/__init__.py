"""Hyper-Connections: several residual streams."""
