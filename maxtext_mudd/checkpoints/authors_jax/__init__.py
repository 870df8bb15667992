"""Models of the authors' JAX code, read."""
