"""The configuration: MaxText's keys and ours, the files that set them, and what is refused."""
