"""Plans a pipeline: what crosses its boundaries, what stages keep, and how long they wait. Pure Python, no JAX.

Counts are exact for `model.pipeline`, where `tests/test_pipeline_plan.py` compares them with compiled programs. Times
are not: they divide bytes and FLOPs by what a chip can do at best, or at half of that for FLOPs.
"""

from collections.abc import Sequence
import dataclasses

from maxtext_mudd import connections
from maxtext_mudd.blocks import num_blocks
from maxtext_mudd.blocks.stacks import num_stages
from maxtext_mudd.config import depth_connection
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.connections.base import itemsize
from maxtext_mudd.connections.keys import raise_first
from maxtext_mudd.connections.routes import routes
from maxtext_mudd.model import counts

KEYS = ("pipeline", "microbatches", "chip")
UTILISATION = 0.5  # share of the peak at which a stage is assumed to compute


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip and its network.

  Attributes:
    peak: dense bfloat16 FLOP/s.
    ici: bytes/s that one link carries in one direction.
    dcn: bytes/s of a chip's share of its host's network, in one direction.
  """

  peak: float
  ici: float
  dcn: float


# TPUs: peaks from cloud.google.com/tpu/docs; links and network from the tables of jax-ml.github.io/scaling-book/tpus
# (one-way ICI bandwidth of a link, and DCN bandwidth per TPU, both somewhat below nominal), read in December 2026.
CHIPS = {
  "v4": Chip(275e12, 4.5e10, 6.25e9),
  "v5e": Chip(197e12, 4.5e10, 3.125e9),
  "v5p": Chip(459e12, 9e10, 6.25e9),
  "v6e": Chip(918e12, 9e10, 12.5e9),
  # NVIDIA's data sheet of the H100 SXM (dense BF16; NVLink 900 GB/s in both directions together), and the guide of the
  # DGX H100 (one ConnectX-7 of 400 Gbit/s for each GPU). NVLink stands for ICI, InfiniBand for DCN.
  "h100": Chip(989e12, 4.5e11, 5e10),
}


def _dense(dilation: int, period: int, window: int) -> dict:
  return {
    "depth_connection": "dense",
    "mudd_placements": [],
    "mudd_depth_start": 0.0,
    "mudd_source_dilation": dilation,
    "mudd_block_period": period,
    "mudd_window": window,
  }


# What a model is compared with, by the keys that differ.
SPARSER = {
  "2x2": _dense(2, 2, 0),
  "4x4": _dense(4, 4, 0),
  "window 8": _dense(1, 1, 8),
  "block AttnRes": {"depth_connection": "attnres"},
  "plain": {"depth_connection": "residual"},
}


@dataclasses.dataclass(frozen=True)
class Request:
  """The arguments of a command line that ask for a plan.

  Attributes:
    stages: S.
    microbatches: M.
    chip: one of `CHIPS`.
  """

  stages: int
  microbatches: int
  chip: str


@dataclasses.dataclass(frozen=True)
class Boundary:
  """What one microbatch takes over one boundary.

  Attributes:
    given: entries of the buffer that the stage before the boundary was given itself. They do not wait for its blocks.
    made: entries that it made.
    whole: arrays [B,T,D] of the carry besides, which it made, too.
  """

  given: int
  made: int
  whole: int

  @property
  def arrays(self) -> int:
    return self.given + self.made + self.whole


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What the pipeline of one model sends and keeps.

  Attributes:
    boundaries: in order.
    entry_bytes: of one entry of the buffer, for one token, with what is kept beside it.
    array_bytes: of one array [B,T,D], for one token.
    kept_bytes: what a stage keeps of one turn for the backward pass, for one token: its whole buffer, and of each of
      its blocks the arrays besides.
  """

  boundaries: tuple[Boundary, ...]
  entry_bytes: int
  array_bytes: int
  kept_bytes: int

  def bytes(self, boundary: Boundary) -> int:
    """What crosses a boundary, for one token."""
    return (boundary.given + boundary.made) * self.entry_bytes + boundary.whole * self.array_bytes

  def waiting_bytes(self, boundary: Boundary) -> int:
    """The part of it that is sent only after the blocks of the stage before."""
    return self.bytes(dataclasses.replace(boundary, given=0))

  @property
  def largest(self) -> Boundary:
    return max(self.boundaries, key=self.bytes)

  @property
  def total_bytes(self) -> int:
    """What crosses all boundaries, for one token."""
    return sum(map(self.bytes, self.boundaries))


def split(arguments: Sequence[str]) -> tuple[Request | None, list[str]]:
  """Separates `pipeline=S`, `microbatches=M` and `chip=NAME` from the other arguments.

  Returns:
    the request, None if there is no `pipeline=S`; and the other arguments.

  Raises:
    ConfigError: a value cannot work.
  """
  given = dict(argument.split("=", 1) for argument in arguments if argument.partition("=")[0] in KEYS)
  others = [argument for argument in arguments if argument.partition("=")[0] not in given]
  if not given:
    return None, others
  if "pipeline" not in given:
    key, value = next(iter(given.items()))
    raise ConfigError(f"{key}={value} is of a pipeline; name its number of stages, too, as in pipeline=4.")
  stages = _number("pipeline", given["pipeline"], 2)
  microbatches = _number("microbatches", given.get("microbatches", str(stages)), 1)
  chip = given.get("chip", "v5p")
  if microbatches % stages:
    raise ConfigError(
      f"microbatches={microbatches} is no multiple of pipeline={stages}, which MaxText needs; use {stages} or "
      f"{2 * stages}, for example."
    )
  if chip not in CHIPS:
    raise ConfigError(f"chip={chip} is not known; use one of {', '.join(CHIPS)}.")
  return Request(stages, microbatches, chip), others


def _number(key: str, text: str, least: int) -> int:
  if not text.isdecimal() or int(text) < least:
    raise ConfigError(f"{key}={text} is not valid; use a whole number from {least} on.")
  return int(text)


def pipelined(config, request: Request):
  """The configuration on the pipeline that is asked for, without repeats.

  Args:
    config: `sizes.Sizes`, or MaxText's whole configuration.

  Raises:
    ConfigError: such a pipeline cannot be.
  """
  layers, stages = config.num_decoder_layers, request.stages
  if layers % stages:
    divisors = ", ".join(str(x) for x in range(2, layers + 1) if layers % x == 0)
    remedy = f"use one of {divisors}" if divisors else "leave it out"
    raise ConfigError(f"pipeline={stages} does not divide the number of layers, {layers}; {remedy}.")
  if config.pipeline_delay_activation_forwarding and request.microbatches < 2 * stages:
    raise ConfigError(
      f"microbatches={request.microbatches} is too few for pipeline_delay_activation_forwarding=True; use at least "
      f"{2 * stages}."
    )
  keys = {
    "ici_pipeline_parallelism": stages,
    "dcn_pipeline_parallelism": 1,
    "num_pipeline_repeats": 1,
    "pipeline_parallel_layers": layers,
  }
  config = config.model_copy(update=keys)
  if not config.mudd:
    return config.model_copy(update={"depth_connection": "residual"})
  try:
    raise_first(depth_connection.of_pipeline(config))
  except ValueError as error:
    raise ConfigError(str(error)) from None
  return config


def idle_turns(config, request: Request, *, delayed: bool | None = None) -> int:
  """In how many turns each stage has no microbatch. The other turns are as many as there are microbatches.

  Args:
    delayed: whether stages get what the stage before sent a turn later; by default as the configuration says.
  """
  delayed = config.pipeline_delay_activation_forwarding if delayed is None else delayed
  return (request.stages - 1) * (2 if delayed else 1)


def microbatch_tokens(config, request: Request) -> float:
  """Tokens of one microbatch on one chip. All chips of a stage share it."""
  rows = config.per_device_batch_size * request.stages / request.microbatches
  return rows * config.max_target_length


def stage_seconds(config, request: Request) -> float:
  """Time of the forward pass of a stage on a microbatch, without that of connections."""
  flops = counts.plain_flops(config) / request.stages * microbatch_tokens(config, request)
  return flops / (UTILISATION * CHIPS[request.chip].peak)


def traffic(config) -> Traffic:
  """What the pipeline of a configuration that `pipelined` returned sends and keeps."""
  stages = num_stages(config)
  length, of_config = num_blocks(config) // stages, routes(config)
  held = [connections.family(config).held(config, stage * length) for stage in range(1, stages + 1)]

  def boundary(stage: int) -> Boundary:
    pair = (stage, stage + 1)
    given = sum(len(entries) for crossed, entries in of_config.given.items() if pair in crossed)
    return Boundary(given, sum(pair in crossed for crossed in of_config.made), held[stage].whole)

  array = itemsize(config) * config.emb_dim
  entry = array + held[-1].bytes_per_token
  kept = held[-1].capacity * entry + length * held[-1].whole * array
  return Traffic(tuple(map(boundary, range(stages - 1))), entry, array, kept)


def compared(config) -> dict:
  """The configuration, as `pipelined` returned it, and sparser ones that the model's sizes allow, by name."""
  configs = {"as given": config}
  for name, keys in SPARSER.items():
    if name == "block AttnRes":
      keys = keys | {"mudd_attnres_block": -(-2 * num_blocks(config) // 8)}
    other = config.model_copy(update=keys)
    if all(getattr(config, key) == value for key, value in keys.items()):
      continue
    try:
      connections.family(other).check_sizes(other)
    except ValueError:
      continue
    configs[name] = other
  return configs


@dataclasses.dataclass(frozen=True)
class Row:
  """What a pipeline of one model costs on one chip, for one microbatch.

  Attributes:
    name: of the placement.
    arrays: by boundary, how many arrays cross it.
    megabytes: by boundary, what crosses it.
    waiting_megabytes: of the boundary that most crosses, what waits for the blocks before it.
    ici, dcn: time that most takes over a link and over the network, by the time of the forward pass of a stage.
    kept_gigabytes: what a stage keeps of all turns for the backward pass.
    sent: what crosses all boundaries, as a share of what does so for the model as given.
  """

  name: str
  arrays: tuple[int, ...]
  megabytes: tuple[float, ...]
  waiting_megabytes: float
  ici: float
  dcn: float
  kept_gigabytes: float
  sent: float


def rows(config, request: Request) -> list[Row]:
  """The costs of a configuration that `pipelined` returned, and of sparser ones."""
  chip, tokens = CHIPS[request.chip], microbatch_tokens(config, request)
  turns, seconds = request.microbatches + idle_turns(config, request), stage_seconds(config, request)
  models = {name: traffic(x) for name, x in compared(config).items()}
  as_given = next(iter(models.values()))

  def row(name: str, model: Traffic) -> Row:
    megabytes = tuple(tokens * model.bytes(x) / 1e6 for x in model.boundaries)
    return Row(
      name,
      tuple(x.arrays for x in model.boundaries),
      megabytes,
      tokens * model.waiting_bytes(model.largest) / 1e6,
      max(megabytes) * 1e6 / chip.ici / seconds,
      max(megabytes) * 1e6 / chip.dcn / seconds,
      turns * tokens * model.kept_bytes / 1e9,
      model.total_bytes / as_given.total_bytes,
    )

  return [row(name, model) for name, model in models.items()]
