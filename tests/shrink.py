"""One rule that makes any model of yaml/ small enough to train here, its kind unchanged."""

from maxtext_mudd.connections.mudd import placements

# The first step moves as the last, and by the gradient alone.
STEPS = {"warmup_steps_fraction": 0.0, "adam_weight_decay": 0.0}
SIZES = {
  "base_emb_dim": 64,
  "base_num_query_heads": 4,
  "base_num_kv_heads": 4,
  "head_dim": 16,
  "base_mlp_dim": 256,
  "vocab_size": 128,
  "max_target_length": 16,
  "per_device_batch_size": 2,
}
HERE = {  # what a CPU, and no corpus, need
  "hardware": "cpu",
  "skip_jax_distributed_system": True,
  "dtype": "float32",
  "attention": "dot_product",
  "dataset_type": "synthetic",
  "enable_checkpointing": False,
  "log_config": False,
  "megablox": False,  # its Pallas kernel is interpreted here; experts stay dropless
  "run_name": "shrunk",
  "jax_cache_dir": "",
}


def overrides(config) -> dict:
  """Keys that shrink a configuration read at its full size."""
  changes = SIZES | STEPS | HERE
  # As few blocks as hold two aggregates, of a sparse model one; a block of AttnRes; or a source that k-DCA leaves out.
  of_k = {"all": 0, "middle_sum": config.mudd_dca_k + 2, "first_and_last": 2 * config.mudd_dca_k}
  changes["base_num_decoder_layers"] = max(
    2,
    config.mudd_block_period,
    config.mudd_source_dilation,
    -(-config.mudd_attnres_block // 2),
    of_k[config.mudd_dca_sources],
    _blocks_of_table(config),
  )
  if changes["base_num_decoder_layers"] > 12:  # random models of so many blocks bend within a step of the usual length
    changes["learning_rate"] = config.learning_rate / 10
  if config.num_experts > 1:
    changes |= {"num_experts": 4, "base_moe_mlp_dim": 256}
  if config.trainable_position_size > 0:
    changes["trainable_position_size"] = SIZES["max_target_length"]
  return changes


def _blocks_of_table(config) -> int:
  """As few blocks as the table of placements allows."""
  for blocks in range(1, config.num_decoder_layers):
    try:
      placements.expand(config.mudd_placements, blocks)
    except ValueError:
      continue
    return blocks
  return config.num_decoder_layers
