"""The decoder with depth connections, its initial values, counts, and what MaxText reports of it."""
