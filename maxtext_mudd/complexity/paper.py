"""The paper's cost formulas (Section 2.6, Appendices C and E), for the sizes of a configuration."""


def plain_activations(config) -> float:
  """The plain model's activations at the peak under full rematerialisation, in the same unit: hidden states of L
  layers, and one layer's own (Table 6: (2L + 34 + 6·N·T/D)/2 in 16 bits)."""
  heads, length = config.num_query_heads, config.max_target_length
  return config.num_decoder_layers + 17 + 3 * heads * length / config.emb_dim


def parameter_ratio(config, *, rounded: bool = False) -> float:
  """R_Δparams: Eq. 13 with K_i = 4(i+1), or η/6, which Table 1 prints."""
  width, blocks = config.emb_dim, config.num_decoder_layers
  if rounded:
    return (blocks + 3) / width / 6
  hidden = [4 * (i + 1) for i in range(1, blocks + 1)]
  return sum(width * k + k * k for k in hidden) / (12 * blocks * width**2)


def flop_ratio(config, *, rounded: bool = False) -> float:
  """R_ΔFLOPs: Eq. 15, or η/(3 + ρ/4), which Table 1 prints."""
  width, blocks, length = config.emb_dim, config.num_decoder_layers, config.max_target_length
  if rounded:
    return (blocks + 3) / width / (3 + length / width / 4)
  hidden = [4 * (i + 1) for i in range(1, blocks + 1)]
  return sum(2 * width * k + k * k for k in hidden) / (blocks * width * (12 * width + length))


def memory_ratio(config, *, streams: int = 3) -> float:
  """Table 6: (L+3)/(L+17+3NT/D) for MUDD, L/(...) with `streams=0` for DenseFormer."""
  return (config.num_decoder_layers + streams) / plain_activations(config)
