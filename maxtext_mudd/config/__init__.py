"""The configuration: MaxText's keys and those of this package, the files that set them, and the checks of both."""
