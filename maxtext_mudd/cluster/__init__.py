"""Submits a training run to a TPU cluster: the command behind `make submit` and `make xpk`, which docs/cluster.md
explains.

request.py reads and checks the variables of the command, with launchers.py. training.py checks the training
configuration that they name. gcluster.py and xpk.py call the launchers, through the functions `command`, `rehearse` and
`submit`. __main__.py is the command.
"""
