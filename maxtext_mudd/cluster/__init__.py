"""Submits a training run to a TPU cluster through XPK: the command behind `make xpk`, which docs/cluster.md explains.

request.py reads and checks the variables of the command. training.py checks the training configuration that they name,
xpk.py calls XPK, and __main__.py is the command.
"""
