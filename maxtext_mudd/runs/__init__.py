"""What a run of a launcher needs around MaxText: checks before it is imported, and the help of the command line."""
