"""Installs MUDD connections in MaxText by replacing eleven of its attributes. No other file replaces any of MaxText.

Four replacements make the model:
  maxtext.configs.pyconfig._initialize_pydantic     reads a MuddConfig instead of a MaxTextConfig
  maxtext.models.models.NNXDecoder                  becomes MuddDecoder
  maxtext.models.models.Embed                       becomes MuddEmbed, which can be initialized as the paper says
  maxtext.models.models.MultiTokenPredictionBlock   becomes one that `mudd_mtp` connects

Two replacements make optimizers treat the parameters of connections by their keys:
  maxtext.optimizers.optimizers.get_optimizer                       weight decay and learning rate
  maxtext.optimizers.optimizers.get_muon_weight_dimension_numbers   which parameters are matrices, for Muon

Four replacements correct what MaxText reports about the model:
  maxtext.utils.maxtext_utils.calculate_tflops_training_per_device   counts the aggregates and the re-allocated FFNs
  maxtext.trainers.pre_train.train.record_activation_metrics         logs the statistics of the aggregates
  maxtext.trainers.pre_train.train.train_step                        adds totals over the aggregates to the metrics
  maxtext.common.metric_logger.MetricLogger                          warns when these totals grow fast

One replacement lets Tunix train models that MaxText does not know by name:
  maxtext.utils.model_creation_utils.TunixMaxTextAdapter   does not ask for the names of parameters in vLLM

Fine-tuning needs one more, which `replace(FINE_TUNING)` makes:
  maxtext.input_pipeline.input_pipeline_interface.make_hf_eval_iterator   starts each evaluation at the first row

Distillation needs two more, which `replace(DISTILLATION)` makes:
  maxtext.trainers.post_train.distillation.distillation_utils.MaxTextCheckpointManager   works with the released Tunix
  maxtext.trainers.post_train.distillation.train_distill.MaxTextDistillationTrainer      stops after the last step

With `mudd: false` each replacement does what the stock attribute does, except for the keys `mudd_decoder_layer` and
`mudd_init`, for multi-token prediction, which is left out in decoding, where it stops stock MaxText, and for three
conveniences of reading a configuration:
  - Several configuration files can be named, and those of this package without their folder.
  - A relative `base_output_directory` is made absolute.
  - The name `maxtext_mudd/byte` stands for the tokenizer of this package.

Functions import MaxText's modules only after `versions.check` has accepted the installed version.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib
import inspect

from maxtext_mudd.config import versions


@dataclasses.dataclass(frozen=True)
class Replacement:
  """One attribute of MaxText that is replaced.

  Attributes:
    module: the module that has the attribute.
    name: the name of the attribute.
    parameters: the first parameters that the stock attribute must have for the replacement to fit.
    replace: takes the stock attribute and returns the new one.
    method: the method that has these parameters, if the attribute is a class.
  """

  module: str
  name: str
  parameters: tuple[str, ...]
  replace: Callable
  method: str = ""

  def stock(self):
    """Returns MaxText's own attribute.

    Raises:
      UnknownMaxText: the attribute does not exist, or does not take `parameters`.
    """
    attribute = getattr(importlib.import_module(self.module), self.name, None)
    function = getattr(attribute, self.method, None) if self.method else attribute
    parameters = tuple(inspect.signature(function).parameters) if callable(function) else ()
    if parameters[: len(self.parameters)] != self.parameters:
      raise versions.UnknownMaxText(
        f"{self.module}.{self.name} does not take {', '.join(self.parameters)}; "
        f"install maxtext=={versions.KNOWN[-1]} as it is published."
      )
    return attribute


@dataclasses.dataclass(frozen=True)
class Reading:
  """What happens when MaxText reads a configuration.

  Attributes:
    check: called with each configuration that is read; raises ConfigError if it cannot work.
    on_error: called with a ConfigError before it is raised. A command exits here, before MaxText prints the error.
  """

  check: Callable | None = None
  on_error: Callable[[Exception], None] | None = None


def _read_mudd_config(stock):
  from maxtext.configs.types import MaxTextConfig

  from maxtext_mudd.config import errors
  from maxtext_mudd.config import files as config_files
  from maxtext_mudd.config.mudd_config import MuddConfig

  @functools.wraps(stock)
  def initialize(argv=None, config_class=MaxTextConfig, **kwargs):
    if config_class is MaxTextConfig:
      config_class = MuddConfig
    try:
      with errors.one_sentence(config_class), config_files.for_maxtext(argv, kwargs) as argv:
        argv, further = config_files.split(argv)
        config = stock(argv, config_class=config_class, **(further | kwargs))
      if _reading.check:
        _reading.check(config)
      return config
    except errors.ConfigError as error:
      if _reading.on_error:
        _reading.on_error(error)
      raise

  return initialize


def _mudd_decoder(stock):
  from maxtext_mudd.model.decoder import MuddDecoder

  return MuddDecoder


def _embedding(stock):
  from maxtext_mudd.model.initializers import MuddEmbed

  return MuddEmbed


def _mtp_block(stock):
  from maxtext_mudd.model.mtp import MuddMultiTokenPredictionBlock

  return MuddMultiTokenPredictionBlock


def _optimizer(stock):
  from maxtext_mudd.model import optimizer

  return optimizer.with_connection_rules(stock)


def _muon_matrices(stock):
  from maxtext_mudd.model import optimizer

  return optimizer.with_connection_matrices(stock)


def _flops(stock):
  from maxtext_mudd.model import reporting

  return reporting.with_connection_flops(stock)


def _metrics(stock):
  from maxtext_mudd.model import reporting

  return reporting.with_connection_metrics(stock)


def _train_step(stock):
  from maxtext_mudd.model import reporting

  return reporting.with_connection_totals(stock)


def _metric_logger(stock):
  from maxtext_mudd.model import instability

  return instability.with_warnings(stock)


def _tunix_adapter(stock):
  from maxtext_mudd.model import tunix_adapter

  return tunix_adapter.without_model_name(stock)


def _evaluation_rows(stock):
  from maxtext_mudd.model import evaluation_rows

  return evaluation_rows.from_the_first(stock)


def _distillation_checkpoints(stock):
  from maxtext_mudd.model import distillation

  return distillation.with_released_tunix(stock)


def _distillation_trainer(stock):
  from maxtext_mudd.model import distillation

  return distillation.with_all_steps(stock)


REPLACEMENTS = (
  Replacement(
    "maxtext.configs.pyconfig", "_initialize_pydantic", ("argv", "config_class", "kwargs"), _read_mudd_config
  ),
  Replacement(
    "maxtext.models.models",
    "NNXDecoder",
    ("self", "layer_cls", "rngs", "base_name", "i", "layer_kwargs"),
    _mudd_decoder,
    method="_create_and_register_layer",
  ),
  Replacement(
    "maxtext.models.models",
    "Embed",
    ("self", "num_embeddings", "num_features", "config", "mesh"),
    _embedding,
    method="__init__",
  ),
  Replacement(
    "maxtext.models.models",
    "MultiTokenPredictionBlock",
    ("self", "config", "mesh", "transformer_layer_module", "decoder", "rngs"),
    _mtp_block,
    method="__init__",
  ),
  Replacement(
    "maxtext.optimizers.optimizers", "get_optimizer", ("config", "learning_rate_schedule", "model", "mesh"), _optimizer
  ),
  Replacement(
    "maxtext.optimizers.optimizers",
    "get_muon_weight_dimension_numbers",
    ("model", "config", "verbose"),
    _muon_matrices,
  ),
  Replacement("maxtext.utils.maxtext_utils", "calculate_tflops_training_per_device", ("config", "log"), _flops),
  Replacement(
    "maxtext.trainers.pre_train.train",
    "record_activation_metrics",
    ("output_metrics", "intermediate_outputs", "config"),
    _metrics,
  ),
  Replacement("maxtext.trainers.pre_train.train", "train_step", ("model", "config"), _train_step),
  Replacement(
    "maxtext.common.metric_logger",
    "MetricLogger",
    ("self", "config", "learning_rate_schedule"),
    _metric_logger,
    method="__init__",
  ),
  Replacement(
    "maxtext.utils.model_creation_utils",
    "TunixMaxTextAdapter",
    ("self", "base_model", "use_standalone_mappings", "use_no_op_mappings", "pad_id"),
    _tunix_adapter,
    method="__init__",
  ),
)
# What `install` leaves alone: `maxtext_mudd.post_train` replaces FINE_TUNING for SFT and DPO, and DISTILLATION, whose
# modules need Tunix, for distillation.
FINE_TUNING = (
  Replacement(
    "maxtext.input_pipeline.input_pipeline_interface",
    "make_hf_eval_iterator",
    ("config", "global_mesh", "process_indices_eval"),
    _evaluation_rows,
  ),
)
DISTILLATION = (
  Replacement(
    "maxtext.trainers.post_train.distillation.distillation_utils",
    "MaxTextCheckpointManager",
    ("self", "raw_iterator", "root_directory", "student_config", "options"),
    _distillation_checkpoints,
    method="__init__",
  ),
  Replacement(
    "maxtext.trainers.post_train.distillation.train_distill",
    "MaxTextDistillationTrainer",
    ("self", "model", "strategy", "optimizer", "training_config"),
    _distillation_trainer,
    method="__init__",
  ),
)

_installed = False
_reading = Reading()


def install(reading: Reading | None = None) -> None:
  """Replaces MaxText's attributes, so that MaxText knows the `mudd_*` keys. Further calls change `reading` only.

  Args:
    reading: what happens when MaxText reads a configuration from now on; None leaves it as it is.

  Raises:
    versions.UnknownMaxText: MaxText's version is not a known one, or an attribute takes other parameters. Nothing is
      replaced then.
  """
  global _installed, _reading
  _reading = reading or _reading
  if _installed:
    return
  versions.check()
  from maxtext_mudd.config import optimizer

  replace(REPLACEMENTS)
  optimizer.are_replaced = _installed = True


def replace(replacements: Sequence[Replacement]) -> None:
  """Replaces attributes of MaxText, all or none.

  Raises:
    versions.UnknownMaxText: an attribute takes other parameters.
  """
  stock = [replacement.stock() for replacement in replacements]
  attributes = [replacement.replace(attribute) for replacement, attribute in zip(replacements, stock)]
  for replacement, attribute in zip(replacements, attributes):
    setattr(importlib.import_module(replacement.module), replacement.name, attribute)
