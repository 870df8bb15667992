"""What a training run needs besides the model: early checks, data, console, lock and exit status."""
