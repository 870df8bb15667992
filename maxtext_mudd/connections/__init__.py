"""Depth connections: how a block's input is made from what came before it. One file per family, one interface:

carry                   class, or classes, of what flows from block to block, a pytree
is_last                 whether this is the connection of the last block
recomputed              whether the block is computed again by the connection's own backward pass; then, too:
through(block, state, carry, arguments)   the carry behind the block, a pure function, and what else it returned
block_input(sums, output), source(output) the parts of `read` and `write` that belong to that function
fit(layer)              makes the stock layer read what `read` returns
start(embedding)        the carry before the first block
read(carry)             the input of this block, and the carry behind it
write(carry, output)    the carry after it, `output` being what the stock layer returned
finish(carry)           [B,T,D], the hidden state after the last block
"""

FAMILIES = ("dense", "hyper_connections", "residual")  # values of `depth_connection`
