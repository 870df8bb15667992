"""The decoder with depth connections, its initial values, its counts of parameters and FLOPs, and its metrics."""
