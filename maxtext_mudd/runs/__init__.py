"""What a run of a launcher needs around MaxText: early checks, help, its data, its lock, its console, how it ends."""
