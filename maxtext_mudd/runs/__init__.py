"""What a run of a launcher needs around MaxText: how it ends, its place in the data, and its lock."""
