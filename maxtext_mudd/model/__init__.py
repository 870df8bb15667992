"""The decoder with depth connections, how it starts, and what MaxText reports of it."""
