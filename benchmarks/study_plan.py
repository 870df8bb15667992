"""The plan of a study: reads its YAML file and lists the runs that belong to it.

A cell is one run: one model trained with one seed and one learning rate. Cells of one seed read the same rows in the
same order and start from the same values of the parameters that they share.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Literal

import pydantic
import yaml

from maxtext_mudd.cluster.request import NAME_LIMIT
from maxtext_mudd.config.errors import ConfigError

EVALUATIONS = 4  # evaluations during a run, besides the one before the first step


class Model(pydantic.BaseModel):
  """One model of a study.

  Attributes:
    config: configuration file, relative to the folder of the study's file; default: the study's.
    keys: keys that the model sets on top of those of the study.
    against: the model that it is compared with; its own name: none; default: the study's baseline.
    paper: the perplexity that the paper reports for it.
    same_time_as: another model. The model gets as many steps as it can do in the time that the other model takes, by
      the step times that `--time` has measured. It needs `tokens` above 0.
    tokens: tokens of a run on one device; default: the study's.
  """

  model_config = pydantic.ConfigDict(extra="forbid")
  config: str = ""
  keys: dict[str, bool | int | float | str] = {}
  against: str = ""
  paper: float | None = pydantic.Field(None, gt=1)
  same_time_as: str = ""
  tokens: int = pydantic.Field(0, ge=0)


class Study(pydantic.BaseModel):
  """The contents of a study's file.

  Attributes:
    config: configuration file of all models, relative to the folder of the study's file.
    tokens: tokens of one run on one device, rounded to whole steps; n devices train on n times as many. 0: the run has
      the `steps` of its configuration.
    unit: unit of losses. "bits per byte" needs a tokenizer whose tokens are bytes.
    seeds: seeds of parameters and data.
    learning_rates: learning rates with which every model is trained.
    baseline: the model that others are compared with.
    keys: keys that all models set on top of `config`.
    models: the models, by name.
    compare: further pairs of models whose difference the report states, the first less the second.
    references: plain models of several lengths (`time`) and sizes (`parameters`), the baseline first. With it `--time`
      measures all models, and the report compares each with a plain model of the same cost (`study_costs.py`).
  """

  model_config = pydantic.ConfigDict(extra="forbid")
  config: str
  tokens: int = pydantic.Field(ge=0)
  unit: Literal["bits per byte", "nats per token"] = "bits per byte"
  seeds: list[int] = pydantic.Field(min_length=1)
  learning_rates: list[float] = pydantic.Field(min_length=1)
  baseline: str
  keys: dict[str, bool | int | float | str] = {}
  models: dict[str, Model]
  compare: list[tuple[str, str]] = []
  references: dict[Literal["time", "parameters"], list[str]] = {}

  @pydantic.model_validator(mode="after")
  def _check_names(self):
    references = [("baseline", self.baseline), *(("compare", name) for pair in self.compare for name in pair)]
    references += [(f"references.{cost}", name) for cost, names in self.references.items() for name in names]
    for name, model in self.models.items():
      references += [(f"models.{name}.{key}", getattr(model, key)) for key in ("against", "same_time_as")]
    for key, name in references:
      if name and name not in self.models:
        raise ValueError(f"{key}={name}: there is no such model; the models are {', '.join(self.models)}")
    for name, model in self.models.items():
      if model.same_time_as and self.models[model.same_time_as].against == model.same_time_as:
        raise ValueError(
          f"models.{name}.same_time_as={model.same_time_as}: that model is compared with none; name one that is"
        )
      if model.same_time_as and not (model.tokens or self.tokens):
        raise ValueError(f"models.{name}.same_time_as changes the tokens of a run; set tokens above 0")
      if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"models.{name}: a name is lower-case letters, digits and underscores, with a letter first")
    for cost, names in self.references.items():
      if names[:1] != [self.baseline] or len(names) < 2:
        raise ValueError(
          f"references.{cost}={names}: name the baseline, {self.baseline}, first, and other plain models"
        )
    for key, values in (("seeds", self.seeds), ("learning_rates", self.learning_rates)):
      if len(set(values)) != len(values):
        raise ValueError(f"{key}={values} has a value twice; name each once")
    return self


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a study.

  Attributes:
    model: name of its model.
    seed: its seed.
    learning_rate: its learning rate.
    config: path of its configuration file.
    keys: keys of its command line.
    unit: unit of its losses.
    steps: number of steps.
    fingerprint: 16 hexadecimal digits of a hash of the values in the configuration file and of the keys, at the time
      when the cell was planned. A result counts only for a cell with the same fingerprint.
  """

  model: str
  seed: int
  learning_rate: float
  config: pathlib.Path
  keys: dict
  unit: str
  steps: int
  fingerprint: str

  @property
  def name(self) -> str:
    """The name of the cell in results and messages."""
    return f"{self.model}-lr{self.learning_rate:g}-seed{self.seed}"

  @property
  def run_name(self) -> str:
    """The name of its folder in --work, and of its workload on a cluster.

    It has digits of the fingerprint, so that a cell whose keys have changed does not read the events and checkpoints of
    the run before the change.
    """
    readable = re.sub("[^a-z0-9]+", "-", self.name.lower())[: NAME_LIMIT - 9].rstrip("-")
    return f"{readable}-{self.fingerprint[:8]}"


def read(path: pathlib.Path) -> Study:
  """Reads the file of a study.

  Raises:
    ConfigError: the file cannot be read, a key is unknown, or a value cannot work.
  """
  try:
    values = yaml.safe_load(path.read_text())
  except OSError as error:
    raise ConfigError(f"{path} cannot be read ({error.strerror}); name a study, as yaml/study/table_5.yml.") from error
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
  if not isinstance(values, dict):
    raise ConfigError(f"{path}: a study maps keys to values, as in `tokens: 2_000_000`.")
  try:
    study = Study(**values)
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
      message = f"is not a key of studies; those are {', '.join(Study.model_fields)}"
    raise ConfigError(f"{path}: {key + ': ' if key else ''}{message}.") from None
  for config in (study.config, *(model.config for model in study.models.values())):
    if config and not (path.parent / config).is_file():
      raise ConfigError(f"{path}: config: {config}: there is no such file beside it.")
  return study


def merged_values(config: pathlib.Path) -> dict:
  """The keys that a configuration file and the files below it set, without MaxText's defaults and mudd_base.yml."""
  values = yaml.safe_load(config.read_text()) or {}
  base = config.parent / values.pop("base_config", "")
  is_model = base.is_file() and base.name != "mudd_base.yml"
  return (merged_values(base) if is_model else {}) | values


def fingerprint(values: dict, keys: dict) -> str:
  """The fingerprint of a cell whose configuration file sets `values` and whose command line sets `keys`."""
  return hashlib.sha256(json.dumps([values, keys], sort_keys=True).encode()).hexdigest()[:16]


def cells(study: Study, folder: pathlib.Path, ratios: dict[str, float]) -> list[Cell]:
  """All cells of a study. Those of the first seed come first, so that early results already compare all models.

  Args:
    folder: folder of the study's file.
    ratios: for models that others name in `same_time_as`: their step time over that of the model that they are compared
      with. Cells whose ratio is not known are left out.

  Raises:
    ConfigError: two cells would have the same folder.
  """
  planned = {}
  for seed in study.seeds:
    for rate in study.learning_rates:
      for name, model in study.models.items():
        if model.same_time_as and model.same_time_as not in ratios:
          continue
        config = (folder / (model.config or study.config)).resolve()
        values, keys = merged_values(config), study.keys | model.keys
        tokens = (model.tokens or study.tokens) * ratios.get(model.same_time_as, 1)
        keys |= _steps(tokens, values | keys) if tokens else {}
        keys |= {"learning_rate": rate, "init_weights_seed": seed, "data_shuffle_seed": seed}
        steps = (values | keys)["steps"]
        cell = Cell(name, seed, rate, config, keys, study.unit, steps, fingerprint(values, keys))
        if other := planned.get(cell.run_name):
          raise ConfigError(
            f"models.{other.model} and models.{name} are trained in the same way, and the folder of both would be "
            f"{cell.run_name}; rename one so that the names differ in their first characters."
          )
        planned[cell.run_name] = cell
  return list(planned.values())


def _steps(tokens: float, values: dict) -> dict[str, int]:
  """The keys for the length of a run that trains on `tokens` tokens on one device.

  MaxText's batch size counts rows of one device, so n devices train on n·tokens. MaxText evaluates after the steps 0,
  interval, 2·interval and so on; the length is such that the last step is one of these.
  """
  rows = values["per_device_batch_size"] * values.get("gradient_accumulation_steps", 1)
  tokens_per_step = rows * values["max_target_length"]
  interval = max(round(tokens / tokens_per_step / EVALUATIONS), 1)
  return {"steps": EVALUATIONS * interval + 1, "eval_interval": interval}
