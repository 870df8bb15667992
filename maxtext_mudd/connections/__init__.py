"""Depth connections: how a block's input is made from the outputs of the blocks before it. One file per family."""
