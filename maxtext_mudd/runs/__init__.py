"""What a run of a launcher needs around MaxText: its data, looked at and prepared before anything is compiled."""
