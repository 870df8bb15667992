"""`python3 -m maxtext_mudd.complexity yaml/NAME.yml [key=value ...]`, or `--table 1`, `--table 6`, or `--list`.

Checks the files, the names of all keys, the values of the `mudd_*` keys and of the sizes, and whether MUDD connections
work in a model of this size. Commands that train, compile or decode check MaxText's other keys, and the features that
do not work with MUDD connections.
"""

import contextlib
import logging
import sys

from maxtext_mudd import assets, blocks, plugin, versions
from maxtext_mudd.complexity import counts, paper, sizes
from maxtext_mudd.config import errors
from maxtext_mudd.runs import early, usage
from maxtext_mudd.runs.launch import exit_with

# Model, configuration, and the two ratios in percent as Table 1 prints them; there T = 4096.
TABLE_1 = (
  ("1.4B", "mudd_1p4b", "0.22", "0.38"),
  ("1.34B", "mudd_deep_1p34b", "0.49", "0.8"),
  ("2.8B", "mudd_2p8b", "0.23", "0.4"),
  ("6.9B", "mudd_6p9b", "0.14", "0.26"),
)
# Model, configuration, and the extra memory in percent that Table 7 measured.
TABLE_6 = (
  ("405M", "mudd_405m", "29"),
  ("834M", "mudd_834m", "21"),
  ("1.4B", "mudd_1p4b", "28"),
  ("2.8B", "mudd_2p8b", "22"),
  ("6.9B", "mudd_6p9b", "17"),
)
USAGE = (
  "name a configuration file, as in: python3 -m maxtext_mudd.complexity yaml/mudd_2p8b.yml (--list names them all); or "
  "--table 1, --table 6"
)


def main(arguments: list[str]) -> None:
  if not arguments:
    exit_with(USAGE)
  if arguments[0] in ("-h", "--help"):
    print(__doc__.strip())
    return
  if arguments[0] == "--list":
    print(usage.listing())
    return
  if arguments[0].startswith("--table="):
    arguments = arguments[0].split("=", 1)
  if arguments[0] == "--table" and arguments[1:] not in (["1"], ["6"]):
    exit_with(f"--table {' '.join(arguments[1:])}: the tables are 1 (parameters and FLOPs) and 6 (activation memory).")
  tables = {"1": table_1, "6": table_6}
  try:
    rows = tables[arguments[1]]() if arguments[0] == "--table" else describe(read(arguments))
  except (errors.ConfigError, versions.UnknownMaxText) as error:
    exit_with(str(error))
  print("\n".join(align(rows)))


def read(arguments: list[str], **overrides):
  """The sizes of a model; MaxText's whole configuration where these do not follow from files alone.

  Raises:
    errors.ConfigError: the configuration cannot work.
    versions.UnknownMaxText: MaxText is missing, or another version is installed.
  """
  argv = ["", *arguments]
  early.check(argv)
  with errors.one_sentence(sizes.Sizes):
    model = sizes.read(argv, **overrides)
  model = model or _read_all(argv, overrides)
  block = model.decoder_block.value
  if block not in blocks.DECODER_BLOCKS:
    supported = ", ".join(blocks.DECODER_BLOCKS)
    raise errors.ConfigError(f"decoder_block={block} has no counts here; use one of {supported}.")
  return model


def _read_all(argv: list[str], overrides: dict):
  logging.disable(logging.WARNING)
  with contextlib.redirect_stdout(sys.stderr):  # MaxText's imports print
    plugin.install(plugin.Reading(on_error=lambda error: exit_with(str(error))))  # before MaxText prints a banner
    from maxtext.configs import pyconfig

    return pyconfig.initialize_pydantic(argv, log_config=False, skip_jax_distributed_system=True, **overrides)


def describe(config) -> list[tuple[str, ...]]:
  """Exact counts beside the paper's formulas, which are those of MUDD: fully dense, four ways."""
  cost = counts.connections_cost(config)
  extra, plain = cost.parameters, counts.plain_parameters(config)
  blocks, width = config.num_decoder_layers, config.emb_dim
  layers = 12 * blocks * width**2
  flops = cost.flops / counts.plain_flops(config)
  memory = cost.activations / paper.plain_activations(config)

  def formulas(ratio, equation, shorter):
    return f"{percent(ratio(config))} ({equation}), {percent(ratio(config, rounded=True))} ({shorter})"

  return [
    (
      f"L={config.num_decoder_layers} D={config.emb_dim} T={config.max_target_length}",
      "exact",
      "paper's formula for MUDD",
    ),
    ("parameters", f"{plain + extra:,}", ""),
    ("  without embeddings and connections", f"{counts.plain_parameters(config, embeddings=False):,}", ""),
    ("  of the connections", f"{extra:,}", ""),
    ("    over 12LD²", percent(extra / layers), ""),
    (
      "    of them W1 and W2, over 12LD²",
      percent(cost.weight_parameters / layers),
      formulas(paper.parameter_ratio, "Eq. 13", "η/6"),
    ),
    ("extra FLOPs", percent(flops), formulas(paper.flop_ratio, "Eq. 15", "η/(3+ρ/4)")),
    ("extra activation memory, in arrays", percent(memory), f"{percent(paper.memory_ratio(config))} (Table 6)"),
  ]


def table_1() -> list[tuple[str, ...]]:
  rows = [
    ("", "R_Δparams", "", "", "", "R_ΔFLOPs", "", "", ""),
    ("model", "Table 1", "η/6", "Eq. 13", "released", "Table 1", "η/(3+ρ/4)", "Eq. 15", "released"),
  ]
  for model, name, parameters, flops in TABLE_1:
    config = read([str(assets.CONFIGURATIONS / f"{name}.yml")], max_target_length=4096)
    cost = counts.connections_cost(config)
    made = cost.weight_parameters / (12 * config.num_decoder_layers * config.emb_dim**2)
    rows.append(
      (
        model,
        f"{parameters}%",
        percent(paper.parameter_ratio(config, rounded=True)),
        percent(paper.parameter_ratio(config)),
        percent(made),
        f"{flops}%",
        percent(paper.flop_ratio(config, rounded=True)),
        percent(paper.flop_ratio(config)),
        percent(cost.flops / counts.plain_flops(config)),
      )
    )
  return [
    *rows,
    ("",),
    (
      "T = 4096. Released: the models of yaml/, whose K is rounded up beyond the next multiple of 64 and whose last DA",
    ),
    ("is one stream with K four times as wide; mudd_hidden_round_to=0 leaves only the last DA apart from Eq. 13.",),
  ]


def table_6() -> list[tuple[str, ...]]:
  rows = [("model", "TFM++", "DenseFormer", "MUDDFM", "DenseFormer", "MUDDFM", "counted", "Table 7")]
  for model, name, measured in TABLE_6:
    config = read([str(assets.CONFIGURATIONS / f"{name}.yml")])
    plain, blocks = paper.plain_activations(config), config.num_decoder_layers
    rows.append(
      (
        model,
        f"{2 * plain:.0f}",
        f"{2 * (plain + blocks):.0f}",
        f"{2 * (plain + blocks + 3):.0f}",
        percent(paper.memory_ratio(config, streams=0)),
        percent(paper.memory_ratio(config)),
        percent(counts.connections_cost(config).activations / plain),
        f"{measured}%",
      )
    )
  return [
    *rows,
    ("",),
    (
      "In bytes per B·T·D: TFM++ 2L + 34 + 6NT/D, DenseFormer 2L more, MUDDFM 2L + 6 more, N heads, T = 2048; then the",
    ),
    ("extra over TFM++ by the paper's formula, by counting arrays, and as the paper measured, parameters included.",),
  ]


def percent(ratio: float) -> str:
  return f"{100 * ratio:.3f}%"


def align(rows: list[tuple[str, ...]]) -> list[str]:
  """Rows as text in columns; a row of one entry stands as it is."""
  table = [row for row in rows if len(row) > 1]
  widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  return [
    "  ".join(f"{entry:<{w}}" for entry, w in zip(row, widths)).rstrip() if len(row) > 1 else row[0] for row in rows
  ]


if __name__ == "__main__":
  main(sys.argv[1:])
