"""The keys of the dense family (MUDD, DenseFormer, DDFormer), and the sizes that they do not allow.

Imports neither JAX nor MaxText, so that a command line is checked before these are imported.
"""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from maxtext_mudd import blocks
from maxtext_mudd.connections.base import STREAMS, Plan
from maxtext_mudd.connections.family_keys import HistoryKeys, WeightKeys
from maxtext_mudd.connections.keys import key
from maxtext_mudd.connections.mudd import placements, sites

_WEIGHT_MLP = {"mudd_dynamic": (True,)}
_NO_TABLE = {"mudd_placements": ([],)}  # the key is a shorthand for a table of placements


class DenseKeys(WeightKeys, HistoryKeys):
  """The keys of `depth_connection=dense`."""

  mudd_placements: list[Any] = key(
    [],
    "Rows, or the path of a YAML file with rows, that say after which blocks DAs stand, what each mixes, which streams "
    "it makes, how wide its weight MLP is and which DAs share it; empty: as the keys that are shorthands for such a "
    "table say.",
  )
  mudd_ways: Literal[1, 4] = key(4, "C: 4 for separate q, k, v and residual streams, 1 for one input.", needs=_NO_TABLE)
  mudd_dense_streams: str = key(
    "qkvr", "Streams that are aggregated; the others take X_i. Needs 4 ways.", needs=_NO_TABLE
  )
  mudd_hidden_expansion: float = key(1.0, "Factor on K = C·N.", needs=_WEIGHT_MLP, gt=0, allow_inf_nan=False)
  mudd_last_hidden_expansion: float = key(
    4.0, "Factor on K = C·N of the last DA.", needs=_WEIGHT_MLP, gt=0, allow_inf_nan=False
  )
  mudd_hidden_round_to: int = key(64, "K becomes (K // n + 1) * n, as released; 0: K exactly.", needs=_WEIGHT_MLP, ge=0)
  mudd_activation: Literal["gelu", "gelu_tanh"] = key("gelu", "Activation between W1 and W2.", needs=_WEIGHT_MLP)
  mudd_weight_norm_scale: bool = key(False, "Learned scale in the norm before W1.", needs=_WEIGHT_MLP)
  mudd_weight_cap: float = key(
    0.0,
    "c: the dynamic weights W become c·tanh(W/c), before a is added; 0: no cap.",
    needs=_WEIGHT_MLP,
    ge=0,
    allow_inf_nan=False,
  )
  mudd_weight_scale: bool = key(
    False, "The dynamic weights W become s ⊙ tanh(W) with learned s [C,N], before a is added.", needs=_WEIGHT_MLP
  )
  mudd_source_dilation: int = key(1, "k: a DA sees every k-th block output (Fig. 9).", needs=_NO_TABLE, ge=1)
  mudd_block_period: int = key(1, "p: a DA follows every p-th block (Fig. 9).", needs=_NO_TABLE, ge=1)
  mudd_depth_start: float = key(
    0.0, "DAs stand only after blocks beyond this share of the depth; 0: after all.", needs=_NO_TABLE, ge=0, lt=1
  )
  mudd_window: int = key(0, "n: a DA sees the last n block outputs and the embedding; 0: all.", needs=_NO_TABLE, ge=0)
  mudd_extra_embeddings: int = key(
    0, "m: further tables of token embeddings, each of which gives DAs one source more (-1 to -m).", ge=0
  )
  mudd_embedding_groups: int = key(
    1,
    "g: groups of extra embeddings; each DA sees one group, deeper DAs the groups of later tables.",
    needs=_NO_TABLE,
    ge=1,
  )
  mudd_pre_norm: bool = key(False, "RMSNorm on every source (Eq. 10).")
  mudd_post_norm: bool = key(False, "RMSNorm on the sum, and X_i added to every stream (Eq. 10).")
  mudd_post_norm_streams: str = key(
    "r",
    "Streams with a post-norm: r as released, qkvr as in Eq. 10.",
    needs={"mudd_post_norm": (True,)},
  )
  mudd_static_start: Literal["released", "zero"] = key(
    "released",
    "Initial static weights a; released: one at the newest source, and zero with pre- and post-norm; zero: as the "
    "authors since the paper with the post-norm alone. Then the model starts as the plain one.",
    needs={"mudd_pre_norm": (False,), "mudd_post_norm": (True,)},
  )
  mudd_first_block_norms: Literal["shared", "separate"] = key(
    "shared", "Attention norms of block 1, whose streams are equal: one, or LN_q, LN_k and LN_v."
  )

  mudd_mtp: Literal["head", "connected"] = key(
    "head",
    "What blocks of multi-token prediction (MTP) read; head: the hidden state, as in MaxText; connected: a stream of "
    "their own, which DA_L makes, and then that of a DA over all sources after each MTP block.",
  )

  @field_validator("mudd_placements", mode="before")
  @classmethod
  def _read_placements(cls, value: Any) -> Any:
    return placements.read(value) if isinstance(value, str) else value

  @model_validator(mode="after")
  def _check_placements(self):
    placements.check(self.mudd_placements)
    of_mlps = [(n, x) for n, row in enumerate(self.mudd_placements, 1) for x in ("hidden", "mlp") if x in row]
    if of_mlps and not self.mudd_dynamic:
      number, column = of_mlps[0]
      raise ValueError(
        f"mudd_placements: row {number} has {column}, and mudd_dynamic=False leaves no weight MLP; remove {column}."
      )
    return self

  @model_validator(mode="after")
  def _check_embedding_groups(self):
    tables, groups = self.mudd_extra_embeddings, self.mudd_embedding_groups
    if groups > 1 and not tables:
      raise ValueError(
        f"mudd_embedding_groups={groups} does nothing with mudd_extra_embeddings=0; leave it at 1, or set "
        f"mudd_extra_embeddings={groups} or another multiple."
      )
    if tables % groups:
      raise ValueError(
        f"mudd_embedding_groups={groups} does not divide mudd_extra_embeddings={tables}; make the number of tables a "
        "multiple of the number of groups."
      )
    return self

  @model_validator(mode="after")
  def _check_streams(self):
    for name in ("mudd_dense_streams", "mudd_post_norm_streams"):
      streams = getattr(self, name)
      if not streams or len(set(streams)) < len(streams) or set(streams) - set(STREAMS):
        raise ValueError(f"{name}={streams!r} must be some of the letters q, k, v and r, each at most once.")
    if self.mudd_weight_cap and self.mudd_weight_scale:
      raise ValueError(
        f"mudd_weight_cap={self.mudd_weight_cap} with mudd_weight_scale=True bounds the weights twice; use one of them."
      )
    if self.mudd_ways == 1 and self.mudd_dense_streams != STREAMS:
      raise ValueError(
        f"mudd_dense_streams={self.mudd_dense_streams!r} needs mudd_ways=4; with one way all streams are the same."
      )
    return self


def check_sizes(config) -> None:
  """Raises ValueError for aggregates that the model's sizes leave without sources or weights, or for a model without
  aggregates.

  Args:
    config: has `DenseKeys` and MaxText's `num_decoder_layers`, `mlp_dim`, `mtp_num_layers` and `scan_layers`.
  """
  num_blocks = blocks.num_blocks(config)
  if config.mudd_block_period > num_blocks:
    raise ValueError(
      f"mudd_block_period={config.mudd_block_period} places no DA in a model of {num_blocks} blocks; use at most "
      f"{num_blocks}."
    )
  if config.mudd_source_dilation > 1 and 0 < config.mudd_window <= config.mudd_source_dilation:
    raise ValueError(
      f"mudd_window={config.mudd_window} with mudd_source_dilation={config.mudd_source_dilation} leaves a DA without "
      f"sources besides its own block; use mudd_window=0 or at least {config.mudd_source_dilation + 1}."
    )
  if config.mudd_source_dilation > num_blocks:
    raise ValueError(
      f"mudd_source_dilation={config.mudd_source_dilation} leaves every DA without sources besides its own block in a "
      f"model of {num_blocks} blocks; use at most {num_blocks}."
    )
  plan = sites.plan(config)
  if config.mudd_mtp == "connected":
    _check_mtp(config, plan)
  aggregates = plan.sites.values()
  _check_mlps(config, plan)
  if not aggregates and config.mudd_depth_start:
    raise ValueError(
      f"mudd_depth_start={config.mudd_depth_start} leaves no DA in a model of {num_blocks} blocks "
      f"(mudd_block_period={config.mudd_block_period}); lower it."
    )
  if not aggregates:
    raise ValueError(
      f"mudd_dense_streams={config.mudd_dense_streams!r} leaves no DA: the only one follows the last block, and makes "
      "the residual stream; add r."
    )
  if config.mudd_dynamic and not all(aggregate.hidden for aggregate in aggregates):
    raise ValueError(
      f"mudd_hidden_expansion={config.mudd_hidden_expansion} (mudd_last_hidden_expansion="
      f"{config.mudd_last_hidden_expansion}) makes a weight MLP of width 0; raise it, or set mudd_dynamic=False."
    )
  _check_widths(config, plan)
  _check_post_norms(config, plan)
  _check_embeddings(config, plan)


def _check_embeddings(config, plan: Plan) -> None:
  """Raises ValueError for a table of extra embeddings that no DA mixes, so that nothing would train it."""
  aggregates = [site for site in plan.sites.values() if site.block <= plan.num_blocks]
  groups = config.mudd_embedding_groups
  if groups > len(aggregates):
    raise ValueError(
      f"mudd_embedding_groups={groups} leaves groups without a DA, of which the model has {len(aggregates)}; use at "
      f"most {len(aggregates)}."
    )
  mixed = {source for site in aggregates for source in site.sources}
  unused = [source for source in range(-1, plan.oldest - 1, -1) if source not in mixed]
  if unused:
    raise ValueError(
      f"mudd_extra_embeddings={plan.extra_embeddings} makes the source {unused[0]}, which no row of mudd_placements "
      "mixes; add it to the sources of a row, or lower mudd_extra_embeddings."
    )


def _check_widths(config, plan: Plan) -> None:
  """Raises ValueError for a rule of hidden widths by which no DA has its width."""
  num_blocks, by_rule = plan.num_blocks, set(plan.sites)
  if config.mudd_placements:
    placed = placements.expand(config.mudd_placements, num_blocks, config.mudd_extra_embeddings)
    by_rule -= {x.block for x in placed if x.hidden is not None}  # of the rest, DAs after MTP blocks are in no row
  read = {
    "mudd_hidden_expansion": any(block < num_blocks for block in by_rule),
    "mudd_last_hidden_expansion": any(block >= num_blocks for block in by_rule),
    "mudd_hidden_round_to": bool(by_rule),
  }
  for name, is_read in read.items():
    value, default = getattr(config, name), DenseKeys.model_fields[name].default
    if value != default and not is_read:
      no_row = " with mudd_placements: no row leaves out the hidden width that it sets"
      why = no_row if config.mudd_placements else ": no DA has a hidden width by this rule"
      raise ValueError(f"{name}={value} does nothing{why}; leave it at {default}.")


def missing_norms(config) -> list[str]:
  """The norms that a model does not have and can have, as arguments of a command."""
  missing = []
  if not config.mudd_pre_norm:
    missing.append("mudd_pre_norm=true")
    if config.mudd_static_start != "released":  # needs a post-norm alone
      missing.append("mudd_static_start=released")
  if not config.mudd_post_norm and _streams_made(sites.plan(config)) & {"x", *config.mudd_post_norm_streams}:
    missing.append("mudd_post_norm=true")
  return missing


def _streams_made(plan: Plan) -> set[str]:
  """The streams that DAs make. Multi-token prediction reads a residual stream."""
  return {"r" if stream == "m" else stream for site in plan.sites.values() for stream in site.streams}


def _check_post_norms(config, plan: Plan) -> None:
  """Raises ValueError for post-norms of streams that no DA makes."""
  chosen, default = config.mudd_post_norm_streams, DenseKeys.model_fields["mudd_post_norm_streams"].default
  streams_made = _streams_made(plan)
  if streams_made == {"x"} and chosen != default:
    raise ValueError(
      f"mudd_post_norm_streams={chosen!r} does nothing where DAs make one input for all streams, which always has a "
      f"post-norm; leave it at {default!r}."
    )
  if config.mudd_post_norm and not streams_made & {"x", *chosen}:
    streams = "".join(c for c in STREAMS if c in streams_made)
    raise ValueError(
      f"mudd_post_norm_streams={chosen!r} norms nothing, so that mudd_post_norm=True would only add X_i: DAs make the "
      f"streams {streams}; name some of these, or set mudd_post_norm=False."
    )


def _check_mlps(config, plan: Plan) -> None:
  """Raises ValueError for a weight MLP that its aggregates cannot share, or that only one of them has."""
  named = [site for site in plan.sites.values() if site.mlp]
  for site in named:
    at, others = f"mudd_placements: mlp: {site.mlp}", [x for x in named if x.mlp == site.mlp and x != site]
    if config.scan_layers:
      raise ValueError(f"{at} needs scan_layers=False; scanned layers have a weight MLP each.")
    if not others:
      raise ValueError(f"{at} is of DA_{site.block} alone; give another DA the same name, or remove mlp.")
    one, other = (f"streams {x.streams}, N={len(x.sources)} and K={x.hidden}" for x in (site, others[-1]))
    if one != other:
      raise ValueError(
        f"{at} is of DA_{site.block} with {one}, and of DA_{others[-1].block} with {other}; streams, the number N of "
        "sources and the width K (hidden) have to be the same, so change them or use another name."
      )


def _check_mtp(config, plan: Plan) -> None:
  """Raises ValueError for `mudd_mtp=connected` where no MTP block or no DA_L exists."""
  num_blocks = blocks.num_blocks(config)
  if config.mtp_num_layers < 1:
    raise ValueError(
      "mudd_mtp=connected connects blocks of multi-token prediction, and mtp_num_layers=0 makes none; set "
      "mtp_num_layers=1 or more, or mudd_mtp=head."
    )
  if num_blocks not in plan.sites:
    raise ValueError(
      f"mudd_mtp=connected needs DA_{num_blocks}, which makes the stream for MTP, and no DA follows block "
      f"{num_blocks}; add r to mudd_dense_streams, use a mudd_block_period that divides {num_blocks}, or place that DA "
      "in mudd_placements."
    )
