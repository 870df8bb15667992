"""Measures what trained models compute inside, and draws it.

    python3 -m maxtext_mudd.analyze similarity --checkpoint M --text book.txt --output inside
    python3 -m maxtext_mudd.analyze weights --checkpoint OUTPUT/RUN/checkpoints/STEP CONFIG.yml --text book.txt \\
      --output inside
    python3 -m maxtext_mudd.analyze heads --checkpoint M --against OUTPUT/RUN/checkpoints/STEP CONFIG.yml key=value \\
      --text book.txt --output inside
    python3 -m maxtext_mudd.analyze speed --study FILE.jsonl --speed FILE.json --output inside

Checkpoints are those that maxtext_mudd.evaluate takes, of plain models, too. The command writes FIGURE.json, with the
arrays and what they mean, and FIGURE.png, and prints a line for each model. Everything is float32 unless keys say
otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shlex
import sys
import tempfile
from typing import Any

from maxtext_mudd import plugin
from maxtext_mudd.analyze import request as requests
from maxtext_mudd.analyze.request import AnalysisRequest, ModelRequest
from maxtext_mudd.checkpoints.interrupts import Interrupts
from maxtext_mudd.config import versions
from maxtext_mudd.config.errors import ConfigError, brief, reachable
from maxtext_mudd.runs import launch, library_warnings

LENGTHS = {True: 64, False: 256}  # default tokens in a sequence, where attention weights are drawn and elsewhere
LOSSES = ("lens", "ablate")
OF_MAPS = ("attention", "heads")
NUMBERING = "Blocks and heads count from 1. DA_i follows block i and makes what block i + 1 reads."


def main(argv: list[str]) -> None:
  """Runs the command. Mistakes of the user end the process with one sentence and status 2."""
  args = requests.parser(__doc__).parse_intermixed_args(argv)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # warnings only: XLA would print its devices
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would print that PyTorch is missing
  try:
    with Interrupts() as interrupts, reachable(), library_warnings.hidden():
      request = requests.read(args)
      check_output(request.output)
      if request.figure == "speed":
        definition, results, lines = _speed(request)
      else:
        plugin.install()
        definition, results, lines = _of_models(request, interrupts.check)
      write(request, definition, results, argv, interrupts.ignore_further)
      print("\n".join([*lines, f"wrote {request.output / request.figure}.json and .png"]))
  except (ConfigError, versions.UnknownMaxText) as error:
    launch.exit_with(str(error))
  except KeyboardInterrupt:
    launch.exit_with("interrupted; no results were written.")


def _speed(request: AnalysisRequest):
  from maxtext_mudd.analyze import speed

  arrays = speed.arrays(request.study, request.speed)
  return speed.DEFINITION, {"study": arrays}, [speed.summary(arrays)]


def _of_models(request: AnalysisRequest, before_batch: Callable[[], None]):
  """(definition, arrays by model and name, lines to print). All models are checked before the first is loaded."""
  import numpy as np

  from maxtext_mudd.analyze import measurement

  opened = [open_model(request, model, name) for model, name in zip(request.models, names(request.models))]
  default = min(LENGTHS[request.figure == "attention"], *(model.config.max_target_length for model in opened))
  length = request.length or default
  data = [sequences(request, model, length) for model in opened]
  for model, read in zip(opened[1:], data[1:]):
    if request.figure in LOSSES and read != data[0]:
      raise ConfigError(
        f"{model.name} reads the text as other tokens than {opened[0].name}, and {request.figure} measures losses per "
        "token; compare models with the same tokenizer."
      )
  results, lines = {}, []
  for model, read in zip(opened, data):
    arrays = measure(request, model, read, length, before_batch)
    results[model.name] = {**arrays, "tokens_read": measurement.Named((), np.array(sum(map(len, read))))}
    lines.append(f"{model.name}: {model.figure.summary(arrays)}")
  return opened[0].figure.definition, results, lines


def names(models: Sequence[ModelRequest]) -> list[str]:
  """A short name for each model: of its run with the step, or of its folder; with a number where two are the same."""
  short_names = []
  for model in models:
    parts = [x for x in model.checkpoint.split("/") if x not in ("", "items")]
    is_of_run = len(parts) > 2 and parts[-2] == "checkpoints"
    name = f"{parts[-3]}/{parts[-1]}" if is_of_run else (parts or ["model"])[-1]
    short_names.append(name if name not in short_names else f"{name} ({len(short_names) + 1})")
  return short_names


@dataclasses.dataclass(frozen=True)
class OpenModel:
  """A model whose parameters are not loaded yet.

  Attributes:
    name: a short name for the results.
    config: the configuration of the model that is measured.
    tokenizer: a `tokens.Tokenizer`.
    load: returns the model; takes no arguments.
    figure: what is measured, a `measurement.Figure` or an `ablation.Ablation`.
    prefix: for errors: the name, if there are several models.
  """

  name: str
  config: Any
  tokenizer: Any
  load: Callable
  figure: Any
  prefix: str


def open_model(request: AnalysisRequest, of_model: ModelRequest, name: str) -> OpenModel:
  """Reads a model's configuration and tokenizer, and checks that it has something to show in the figure.

  Raises:
    ConfigError: the model cannot be read, or has nothing to show.
  """
  from maxtext_mudd.analyze import ablation, figures
  from maxtext_mudd.inference import checkpoint, inspection

  config, tokenizer, load = checkpoint.read(
    of_model.checkpoint, of_model.config_file, of_model.overrides, of_model.tokenizer
  )
  prefix = f"{name}: " if len(request.models) > 1 else ""
  figure_class = {**figures.FIGURES, "ablate": ablation.Ablation}[request.figure]
  with prefixed(prefix):
    if config.mhc_expansion_rate > 1:
      raise ConfigError(
        f"mhc_expansion_rate={config.mhc_expansion_rate}: figures are of models with one residual stream; call "
        "maxtext_mudd.inspect in Python."
      )
    with prefixed("", ValueError):
      config = inspection.inspectable_config(config, request.figure in OF_MAPS)
    return OpenModel(name, config, tokenizer, load, figure_class(request, config, tokenizer), prefix)


@contextlib.contextmanager
def prefixed(prefix: str, errors: type[ValueError] = ConfigError) -> Iterator[None]:
  """Puts the name of a model before what is wrong with it, and makes a ConfigError of other errors of the user."""
  try:
    yield
  except errors as error:
    raise ConfigError(f"{prefix}{error}") from error


def sequences(request: AnalysisRequest, model: OpenModel, length: int) -> list[list[int]]:
  """The tokens that a model reads. Raises ConfigError."""
  from maxtext_mudd.analyze import measurement

  with prefixed(model.prefix):
    return measurement.sequences(request.text, model.tokenizer, model.config, length, request.sequences)


def measure(
  request: AnalysisRequest, of_model: OpenModel, read: list[list[int]], length: int, before_batch: Callable[[], None]
):
  """The arrays of the figure, by name.

  Args:
    read: the tokens of each sequence.
    length: positions of a sequence, of which the last may be padding.

  Raises:
    ConfigError: the model cannot be loaded, or what it computes has no figure.
  """
  from maxtext_mudd.analyze import measurement
  from maxtext_mudd.inference import inspection

  data = list(measurement.batches(read, of_model.config, length, request.batch_size))
  try:
    with prefixed(of_model.prefix):
      model = of_model.load()
      with prefixed("", ValueError):
        model = inspection.inspectable(model, request.figure in OF_MAPS)
      return of_model.figure.measure(model, data, before_batch, of_model.name)
  except Exception as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      raise ConfigError(
        f"{of_model.prefix}the model does not fit the device with --batch-size={request.batch_size} and sequences of "
        f"{length} tokens; make one of them smaller ({brief(error)})."
      ) from error
    raise


def check_output(folder: pathlib.Path) -> None:
  """Raises ConfigError if no file can be written into a folder, which need not exist yet. Leaves nothing behind."""
  existing = next(x for x in (folder, *folder.parents) if x.exists())
  try:
    with tempfile.TemporaryDirectory(dir=existing, prefix=".analyze.") as trial:
      (pathlib.Path(trial) / "x").write_text("{}")
  except OSError as error:
    raise _unwritable(folder, error) from error


def _unwritable(folder: pathlib.Path, error: OSError) -> ConfigError:
  return ConfigError(f"--output={folder} cannot be written ({brief(error)}); name another folder.")


def write(
  request: AnalysisRequest, definition: str, results, argv: Sequence[str], last_check: Callable[[], None]
) -> None:
  """Writes FIGURE.json and FIGURE.png. An incomplete file never has the final name.

  Args:
    last_check: called when the files are complete and before they get their names. If it raises, there are no files.

  Raises:
    ConfigError: a file cannot be written.
  """
  from maxtext_mudd.analyze import drawing

  contents = {
    "figure": request.figure,
    "definition": definition,
    "numbering": NUMBERING,
    "command": shlex.join(["python3", "-m", "maxtext_mudd.analyze", *argv]),
    "models": {name: {key: as_json(x) for key, x in arrays.items()} for name, arrays in results.items()},
  }
  try:
    request.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=request.output, prefix=".analyze.") as folder:
      files = [pathlib.Path(folder) / f"{request.figure}.{ending}" for ending in ("json", "png")]
      files[0].write_text(json.dumps(contents, allow_nan=False) + "\n")
      drawing.write(request.figure, results, files[1])
      last_check()
      for file in files:
        file.rename(request.output / file.name)
  except OSError as error:
    raise _unwritable(request.output, error) from error


def as_json(array) -> dict:
  """A `Named` for JSON. NaN becomes null."""

  def plain(values):
    if isinstance(values, list):
      return [plain(x) for x in values]
    return values if math.isfinite(values) else None

  labels = {axis: list(x) for axis, x in array.labels.items()}
  return {
    "dims": list(array.dims),
    "shape": list(array.values.shape),
    "labels": labels,
    "values": plain(array.values.tolist()),
  }


if __name__ == "__main__":
  main(sys.argv[1:])
