"""Adds depth connections to what MaxText reports: FLOPs, and statistics of connections among the metrics."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from maxtext_mudd import connections
from maxtext_mudd.blocks import num_blocks, stacks
from maxtext_mudd.config.changed import changed
from maxtext_mudd.connections import metrics
from maxtext_mudd.connections.metrics import LARGEST_WEIGHT, SOWN
from maxtext_mudd.model import counts, mtp
from maxtext_mudd.model.instability import GRADIENT_NORM, TOTALS

_FORWARD_AND_BACKWARD = 3


def connection_tflops(config) -> float:
  """TFLOPs per train step and device beyond what MaxText counts."""
  tokens = config.per_device_batch_size * config.max_target_length * config.gradient_accumulation_steps
  width = counts.extra_ffn_width(config)
  if config.num_experts > 1:
    width *= config.num_experts_per_tok
  feed_forward = 2 * width * config.emb_dim * (len(config.mlp_activations) + 1)
  of_connections = config.mhc_expansion_rate * counts.connections_cost(config).flops  # residual streams are positions
  return _FORWARD_AND_BACKWARD * tokens * (of_connections + feed_forward) / 1e12


def with_connection_flops(stock):
  @functools.wraps(stock)
  def calculate(config, log=True):
    total, weights, attention = stock(config, log=log)
    if getattr(config, "mudd", False):
      extra = connection_tflops(config)
      total, weights = total + extra, weights + extra
      if log:
        print(f"With the depth connections: {total:.2f} TFLOPs, {100 * extra / total:.2f}% of which are due to them.")
    return total, weights, attention

  return calculate


def with_connection_metrics(stock):
  @functools.wraps(stock)
  def record(output_metrics, intermediate_outputs, config):
    stock(output_metrics, intermediate_outputs, config)
    for path, value in jax.tree_util.tree_leaves_with_path(intermediate_outputs):
      keys = [str(getattr(entry, "key", "")) for entry in path]
      name = next((match for match in map(SOWN.fullmatch, keys) if match), None)
      if name is None:
        continue
      last, statistic, stream = name.groups()
      # MaxText sums what layers sow over the microbatches of a step.
      value = value / config.gradient_accumulation_steps
      for after, mean in _by_aggregate(keys, value, stream, config, is_last=bool(last)):
        if statistic == LARGEST_WEIGHT:
          output_metrics.setdefault(TOTALS, {}).setdefault(statistic, {})[after] = mean
        else:
          output_metrics["scalar"][f"mudd/{statistic}/{stream}/da_{after:03d}"] = mean

  return record


def with_connection_totals(stock):
  """`train_step` that adds "mudd/max_weight" and "mudd/grad_norm" to the metrics of every step, and their parts by the
  number of blocks before a reader, which `instability.Watch` reads."""

  @functools.wraps(stock)
  def train_step(model, config, *args, **kwargs):
    if not getattr(config, "mudd", False):
      return stock(model, config, *args, **kwargs)
    with metrics.recording() as totals:
      # MaxText calls `record_activation_metrics` with this key. Layers have the configuration as it is.
      state, found = stock(model, changed(config, record_internal_nn_metrics=1), *args, **kwargs)
    parts, scalars = found.setdefault(TOTALS, {}), found["scalar"]
    # The optimizer sees clipped gradients. With the optimizer's state on the host MaxText does not say by how much.
    is_known = "learning/raw_grad_norm" in scalars or config.gradient_clipping_threshold <= 0
    if is_known and (norms := totals.get(GRADIENT_NORM)):
      before = scalars.get("learning/raw_grad_norm", 1) / jnp.maximum(scalars.get("learning/grad_norm", 1), 1e-30)
      parts[GRADIENT_NORM] = {block: norm * before for block, norm in norms.items()}
      scalars["mudd/grad_norm"] = jnp.sqrt(sum(jnp.square(x) for x in parts[GRADIENT_NORM].values()))
    if weights := parts.get(LARGEST_WEIGHT):
      scalars["mudd/max_weight"] = functools.reduce(jnp.maximum, weights.values())
    return state, found

  return train_step


def _of_working_stages(config, value: Float[Array, "N S ..."]) -> Float[Array, "S ..."]:
  """The largest of the values that each of S stages sowed in N turns, without turns in which it has no microbatch."""
  delay = 2 if config.pipeline_delay_activation_forwarding else 1
  microbatch = np.arange(value.shape[0])[:, None] - delay * np.arange(value.shape[1])
  works = (microbatch >= 0) & (microbatch < config.num_pipeline_microbatches)
  works = works.reshape(works.shape + (1,) * (value.ndim - works.ndim))
  return jnp.max(value, axis=0, where=works, initial=0)


def _by_aggregate(keys: list[str], value, stream: str, config, *, is_last: bool):
  """Yields (number of the block before, its value) for a value that was sown under a path. Scanned layers sow the
  values of all blocks in one array.

  Args:
    stream: what the value belongs to: a stream, or a sublayer.
    is_last: whether it is of what follows the last block, or an MTP block.
  """
  if is_last and stacks.num_stages(config) > 1:
    value = _of_working_stages(config, value)[-1]
  if is_last:
    yield num_blocks(config) + (mtp.number_in(keys) or 0), value
  elif stack := stacks.of_path(config, keys):
    plan = connections.plan(config)
    if stack.of_stages:
      value = _of_working_stages(config, value)
    for block, mean in zip(stack.blocks, jnp.reshape(value, -1)):
      site = plan.before(block)
      # In a stack with sites, blocks sow values also of streams that they do not read.
      if not plan.sites or (site and stream in (*site.streams, metrics.ALL)):
        yield block - 1, mean
  else:
    yield stacks.block_of_single(config, keys) - 1, value
