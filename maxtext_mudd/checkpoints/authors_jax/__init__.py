"""Reads models of the authors' JAX code, a fork of an old MaxText."""
