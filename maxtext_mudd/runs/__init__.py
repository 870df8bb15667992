"""What a run of a launcher needs around MaxText: the console and its log file."""
