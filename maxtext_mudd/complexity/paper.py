"""The paper's formulas for the cost of MUDD connections (Section 2.6, Appendices C and E), for the sizes of a model.

Each function takes a configuration: `sizes.Sizes`, or MaxText's. In the paper's letters, L is the number of layers, D
the width, T the length of a sequence, N the number of heads, η = (L + 3) / D and ρ = T / D.
"""


def block_parameters(config) -> int:
  """12LD², the parameters of all blocks of the plain model, by which the paper divides in R_Δparams."""
  return 12 * config.num_decoder_layers * config.emb_dim**2


def plain_activations(config) -> float:
  """The activations of the plain model at the peak, under full rematerialisation, in arrays of B·T·D.

  These are the hidden states of all layers and what one layer holds: (2L + 34 + 6NT/D) / 2 of Table 6, in 16 bits.
  """
  heads, length = config.num_query_heads, config.max_target_length
  return config.num_decoder_layers + 17 + 3 * heads * length / config.emb_dim


def parameter_ratio(config, *, approximate: bool = False) -> float:
  """R_Δparams: Eq. 13 with K_i = 4(i+1) or, with `approximate`, η/6, which Table 1 prints."""
  width, layers = config.emb_dim, config.num_decoder_layers
  if approximate:
    return (layers + 3) / width / 6
  hidden_widths = [4 * (i + 1) for i in range(1, layers + 1)]
  return sum(width * k + k * k for k in hidden_widths) / block_parameters(config)


def flop_ratio(config, *, approximate: bool = False) -> float:
  """R_ΔFLOPs: Eq. 15 or, with `approximate`, η/(3 + ρ/4), which Table 1 prints."""
  width, layers, length = config.emb_dim, config.num_decoder_layers, config.max_target_length
  if approximate:
    return (layers + 3) / width / (3 + length / width / 4)
  hidden_widths = [4 * (i + 1) for i in range(1, layers + 1)]
  return sum(2 * width * k + k * k for k in hidden_widths) / (layers * width * (12 * width + length))


def memory_ratio(config, *, streams: int = 3) -> float:
  """The extra activation memory of Table 6: (L+3)/(L+17+3NT/D) for MUDD, and L/(...) with `streams=0` for DenseFormer.

  Args:
    streams: the number of streams that are kept besides X_i.
  """
  return (config.num_decoder_layers + streams) / plain_activations(config)
