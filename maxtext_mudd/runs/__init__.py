"""What a run of a launcher needs around MaxText: its data and its place in them, how it ends, and its lock."""
