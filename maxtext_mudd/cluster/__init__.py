"""Submits training to a TPU cluster through XPK: `make xpk`, which docs/cluster.md explains.

request.py -> training.py, xpk.py -> __main__.py
"""
