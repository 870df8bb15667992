"""Prints what a model costs: parameters, FLOPs and activation memory, exactly and by the paper's formulas.

    python3 -m maxtext_mudd.complexity yaml/NAME.yml [key=value ...]   costs of one model
    python3 -m maxtext_mudd.complexity --placements yaml/NAME.yml ...  and the table of its depth-wise aggregates
    python3 -m maxtext_mudd.complexity yaml/NAME.yml pipeline=S microbatches=M chip=v5p [--png FILE]
                                                                       what a pipeline of S stages sends and keeps
    python3 -m maxtext_mudd.complexity --table 1                       the paper's Table 1: parameters and FLOPs
    python3 -m maxtext_mudd.complexity --table 6                       the paper's Table 6: activation memory
    python3 -m maxtext_mudd.complexity --list                          the configuration files of this package

It checks the files, the names of all keys, the values of the `mudd_*` keys and of the sizes, and whether MUDD
connections work in a model of this size. The commands that train, compile or decode check MaxText's other keys, and
refuse features that do not work with MUDD connections.
"""

import contextlib
import logging
import sys

from maxtext_mudd import assets, blocks, connections, plugin
from maxtext_mudd.complexity import paper, pipeline, pipeline_drawing, sizes
from maxtext_mudd.config import errors, versions
from maxtext_mudd.connections.mudd.placements import span
from maxtext_mudd.model import counts
from maxtext_mudd.runs import early_check, usage
from maxtext_mudd.runs.launch import exit_with

# Model, configuration, and the ratios of parameters and of FLOPs in percent, as Table 1 prints them for T = 4096.
TABLE_1 = (
  ("1.4B", "mudd_1p4b", "0.22", "0.38"),
  ("1.34B", "mudd_deep_1p34b", "0.49", "0.8"),
  ("2.8B", "mudd_2p8b", "0.23", "0.4"),
  ("6.9B", "mudd_6p9b", "0.14", "0.26"),
)
# Model, configuration, and the extra memory in percent, as measured in Table 7.
TABLE_6 = (
  ("405M", "mudd_405m", "29"),
  ("834M", "mudd_834m", "21"),
  ("1.4B", "mudd_1p4b", "28"),
  ("2.8B", "mudd_2p8b", "22"),
  ("6.9B", "mudd_6p9b", "17"),
)
USAGE = (
  "name a configuration file, as in: python3 -m maxtext_mudd.complexity yaml/mudd_2p8b.yml (--list names them all), or "
  "pass --table 1 or --table 6."
)

PLAN_NOTES = """
Arrays: how many arrays [B,T,D] of a microbatch cross each boundary forward in a turn; as many cross it backward.
Largest: bytes of the boundary that most crosses, from one chip to one other. Waiting: the part of it that the stage
before made, which is sent after its blocks. ICI, DCN: time of the largest over one link, or over the chip's share of
the network between slices, divided by the time of the forward pass of a stage; the backward pass has about three times
as long. Kept: what a stage keeps on a chip for the backward pass, of all turns: buffers of the sources of the whole
model, and inputs of its blocks. Sent: bytes over all boundaries, by those of the model as given. Times are bounds from
data sheets, and nothing was measured.
"""


def main(arguments: list[str]) -> None:
  """Runs the command. Mistakes of the user end the process with one sentence and status 2."""
  try:
    print("\n".join(answer(arguments)))
  except (errors.ConfigError, versions.UnknownMaxText) as error:
    exit_with(str(error))


def answer(arguments: list[str]) -> list[str]:
  """The lines that the command prints. It writes the picture that `--png` names."""
  with_placements = "--placements" in arguments
  arguments = [argument for argument in arguments if argument != "--placements"]
  if {"-h", "--help"} & set(arguments[:1]):
    return [__doc__.strip()]
  if arguments[:1] == ["--list"]:
    return [usage.listing()]
  if arguments and arguments[0].startswith("--table="):
    arguments = arguments[0].split("=", 1)
  if arguments[:1] == ["--table"]:
    tables = {"1": table_1, "6": table_6}
    if len(arguments) != 2 or arguments[1] not in tables:
      raise errors.ConfigError(
        f"--table {' '.join(arguments[1:])}: the tables are 1 (parameters and FLOPs) and 6 (activation memory)."
      )
    return align(tables[arguments[1]]())
  picture, arguments = pipeline_drawing.split(arguments)
  request, arguments = pipeline.split(arguments)
  if picture and not request:
    raise errors.ConfigError(f"--png {picture} draws a pipeline; name its number of stages, too, as in pipeline=4.")
  if not arguments:
    raise errors.ConfigError(USAGE)
  config = read(arguments)
  if request:
    config = pipeline.pipelined(config, request)
    costs = pipeline.rows(config, request)
    if picture:
      pipeline_drawing.write(costs, request, picture)
    return [*align(plan(config, request)), "", *align(plan_table(costs)), "", *PLAN_NOTES.strip().splitlines()]
  lines = align(describe(config))
  return [*lines, "", *align(placements(config))] if with_placements or config.mudd_placements else lines


def read(arguments: list[str], **overrides):
  """Reads the sizes of a model.

  Args:
    arguments: configuration files and key=value arguments.
    overrides: keys that override those of the arguments.

  Returns:
    `sizes.Sizes` or, if files and arguments alone do not determine the sizes, MaxText's whole configuration.

  Raises:
    errors.ConfigError: the configuration cannot work.
    versions.UnknownMaxText: MaxText is missing, or its version is not a known one.
  """
  argv = ["", *arguments]
  early_check.check(argv)
  with errors.one_sentence(sizes.Sizes):
    model_sizes = sizes.read(argv, **overrides)
  config = model_sizes or _read_with_maxtext(argv, overrides)
  block = config.decoder_block.value
  if block not in blocks.PLAIN_BLOCKS:
    supported = ", ".join(blocks.PLAIN_BLOCKS)
    raise errors.ConfigError(
      f"decoder_block={block} is not one whose costs this command counts; use one of {supported}."
    )
  return config


def _read_with_maxtext(argv: list[str], overrides: dict):
  logging.disable(logging.WARNING)
  with contextlib.redirect_stdout(sys.stderr):  # MaxText's imports print
    plugin.install(plugin.Reading(on_error=lambda error: exit_with(str(error))))  # before MaxText prints a banner
    from maxtext.configs import pyconfig

    return pyconfig.initialize_pydantic(argv, log_config=False, skip_jax_distributed_system=True, **overrides)


def describe(config) -> list[tuple[str, ...]]:
  """Rows with exact counts; and for the dense family beside them the paper's formulas, which are for MUDD with four
  streams."""
  cost = counts.connections_cost(config)
  of_connections = cost.parameters - cost.embedding_parameters
  plain, block_parameters = counts.plain_parameters(config), paper.block_parameters(config)
  flops = cost.flops / counts.plain_flops(config)
  memory = cost.activations / paper.plain_activations(config)

  def both_formulas(ratio, equation, approximation):
    return f"{percent(ratio(config))} ({equation}), {percent(ratio(config, approximate=True))} ({approximation})"

  rows = [
    (
      f"L={config.num_decoder_layers} D={config.emb_dim} T={config.max_target_length}",
      "exact",
      "paper's formula for MUDD",
    ),
    ("parameters", f"{plain + cost.parameters:,}", ""),
    ("  without embeddings and connections", f"{counts.plain_parameters(config, embeddings=False):,}", ""),
    *([("  of extra embeddings", f"{cost.embedding_parameters:,}", "")] if cost.embedding_parameters else []),
    ("  of the connections", f"{of_connections:,}", ""),
    ("    over 12LD²", percent(of_connections / block_parameters), ""),
    (
      "    W1 and W2 alone, over 12LD²",
      percent(cost.weight_parameters / block_parameters),
      both_formulas(paper.parameter_ratio, "Eq. 13", "η/6"),
    ),
    ("extra FLOPs", percent(flops), both_formulas(paper.flop_ratio, "Eq. 15", "η/(3+ρ/4)")),
    ("extra activation memory, counted in arrays", percent(memory), f"{percent(paper.memory_ratio(config))} (Table 6)"),
  ]
  if config.depth_connection == "dense":
    return rows
  return [row[:2] for row in rows if not row[0].strip().startswith("W1")]


def placements(config) -> list[tuple[str, ...]]:
  """Rows with the depth-wise aggregates, in the columns of `mudd_placements`."""
  sites = connections.plan(config).sites if config.mudd else {}
  if not sites:
    return [("no depth-wise aggregates between blocks",)]
  rows = [("block", "sources", "streams", "hidden", "mlp")]
  for site in sites.values():
    rows.append((f"{site.block}", span(site.sources), site.streams, f"{site.hidden or '-'}", site.mlp or "-"))
  columns = 5 if any(site.mlp for site in sites.values()) else 4
  return [row[:columns] for row in rows]


def plan(config, request: pipeline.Request) -> list[tuple[str, ...]]:
  """Rows with what all placements of a pipeline have in common."""
  stages, microbatches = request.stages, request.microbatches
  layers = config.num_decoder_layers // stages

  def turns(delayed: bool) -> str:
    idle = pipeline.idle_turns(config, request, delayed=delayed)
    number = microbatches + idle
    return f"{number}, in {idle} of which a stage is idle ({100 * idle / number:.1f}%)"

  keys = f"ici_pipeline_parallelism={stages} num_layers_per_pipeline_stage={layers}"
  seconds = pipeline.stage_seconds(config, request)
  return [
    ("model", f"L={blocks.num_blocks(config)} D={config.emb_dim} T={config.max_target_length}"),
    ("keys", f"{keys} num_pipeline_microbatches={microbatches}"),
    ("microbatch", f"{pipeline.microbatch_tokens(config, request):,.0f} tokens on a chip"),
    ("turns", turns(delayed=False)),
    ("  with pipeline_delay_activation_forwarding", turns(delayed=True)),
    (f"forward pass of a stage on a {request.chip}", f"{1000 * seconds:.1f} ms, at half of its peak"),
  ]


def plan_table(costs: list[pipeline.Row]) -> list[tuple[str, ...]]:
  """Rows with what each placement costs."""
  rows = [("placement", "arrays", "largest, MB", "waiting, MB", "ICI", "DCN", "kept, GB", "sent")]
  for cost in costs:
    rows.append(
      (
        cost.name,
        " ".join(map(str, cost.arrays)),
        f"{max(cost.megabytes):.0f}",
        f"{cost.waiting_megabytes:.0f}",
        f"{cost.ici:.3f}",
        f"{cost.dcn:.2f}",
        f"{cost.kept_gigabytes:.1f}",
        f"{100 * cost.sent:.0f}%",
      )
    )
  return rows


def table_1() -> list[tuple[str, ...]]:
  """Rows with the ratios of parameters and FLOPs: as Table 1 prints them, by formulas, and of the released models."""
  rows = [
    ("", "R_Δparams", "", "", "", "R_ΔFLOPs", "", "", ""),
    ("model", "Table 1", "η/6", "Eq. 13", "released", "Table 1", "η/(3+ρ/4)", "Eq. 15", "released"),
  ]
  for model, name, parameters, flops in TABLE_1:
    config = read([str(assets.CONFIGURATIONS / f"{name}.yml")], max_target_length=4096)
    cost = counts.connections_cost(config)
    released = cost.weight_parameters / paper.block_parameters(config)
    rows.append(
      (
        model,
        f"{parameters}%",
        percent(paper.parameter_ratio(config, approximate=True)),
        percent(paper.parameter_ratio(config)),
        percent(released),
        f"{flops}%",
        percent(paper.flop_ratio(config, approximate=True)),
        percent(paper.flop_ratio(config)),
        percent(cost.flops / counts.plain_flops(config)),
      )
    )
  return [
    *rows,
    ("",),
    ("T = 4096. Released: the models of yaml/. Their K is rounded up beyond the next multiple of 64, and their last",),
    ("DA is one stream with K four times as wide. With mudd_hidden_round_to=0 only the last DA differs from Eq. 13.",),
  ]


def table_6() -> list[tuple[str, ...]]:
  """Rows with the activation memory by the formulas of Table 6, by counting arrays, and as measured in Table 7."""
  rows = [("model", "TFM++", "DenseFormer", "MUDDFM", "DenseFormer", "MUDDFM", "counted", "Table 7")]
  for model, name, measured in TABLE_6:
    config = read([str(assets.CONFIGURATIONS / f"{name}.yml")])
    plain, layers = paper.plain_activations(config), config.num_decoder_layers
    rows.append(
      (
        model,
        f"{2 * plain:.0f}",
        f"{2 * (plain + layers):.0f}",
        f"{2 * (plain + layers + 3):.0f}",
        percent(paper.memory_ratio(config, streams=0)),
        percent(paper.memory_ratio(config)),
        percent(counts.connections_cost(config).activations / plain),
        f"{measured}%",
      )
    )
  return [
    *rows,
    ("",),
    ("The first three columns are bytes per B·T·D, for N heads and T = 2048: TFM++ has 2L + 34 + 6NT/D, DenseFormer",),
    ("2L more, and MUDDFM 2L + 6 more. The others are the extra memory over that of TFM++: by the paper's formulas,",),
    ("by counting arrays, and as the paper measured it, which includes the parameters.",),
  ]


def percent(ratio: float) -> str:
  return f"{100 * ratio:.3f}%"


def align(rows: list[tuple[str, ...]]) -> list[str]:
  """Formats rows as lines with aligned columns. A row of one entry is a line by itself."""
  table = [row for row in rows if len(row) > 1]
  widths = [max(map(len, column)) for column in zip(*table)]
  return [
    "  ".join(f"{entry:<{width}}" for entry, width in zip(row, widths)).rstrip() if len(row) > 1 else row[0]
    for row in rows
  ]


if __name__ == "__main__":
  main(sys.argv[1:])
