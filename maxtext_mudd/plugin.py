"""The only file that replaces anything in MaxText.

Three attributes make the model:
  maxtext.configs.pyconfig._initialize_pydantic   reads MuddConfig where it would read MaxTextConfig
  maxtext.models.models.NNXDecoder                is MuddDecoder
  maxtext.models.models.Embed                     is MuddEmbed, which can start as the paper says
and two correct what MaxText reports of it:
  maxtext.utils.maxtext_utils.calculate_tflops_training_per_device   counts the aggregates and the re-allocated FFNs
  maxtext.trainers.pre_train.train.record_activation_metrics         logs the statistics of the aggregates
With `mudd: false` each of them does what it replaces, but for what `mudd_decoder_layer` and `mudd_init` ask, and three
courtesies when a configuration is read: several files can be named, those of this package without their folder; a
relative `base_output_directory` is made absolute; and `maxtext_mudd/byte` names the tokenizer of this package.

What imports MaxText's modules is imported inside functions, after the version is known to be right.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib
import inspect

from maxtext_mudd import versions


@dataclasses.dataclass(frozen=True)
class Seam:
  """One attribute of MaxText that is replaced.

  Attributes:
    module, name: where it is.
    parameters: leading parameters that it must have for the replacement to fit.
    method: where the attribute is a class, the method with these parameters.
    replace: from the stock attribute to the new one.
  """

  module: str
  name: str
  parameters: tuple[str, ...]
  replace: Callable
  method: str = ""

  def stock(self):
    """The attribute that MaxText has.

    Raises:
      UnknownMaxText: it is not there, or does not take `parameters`.
    """
    found = getattr(importlib.import_module(self.module), self.name, None)
    function = getattr(found, self.method, None) if self.method else found
    parameters = tuple(inspect.signature(function).parameters) if callable(function) else ()
    if parameters[: len(self.parameters)] != self.parameters:
      raise versions.UnknownMaxText(
        f"{self.module}.{self.name} does not take {', '.join(self.parameters)}; "
        f"install maxtext=={versions.KNOWN[-1]} as it is published."
      )
    return found


@dataclasses.dataclass(frozen=True)
class Reading:
  """How configurations are read.

  Attributes:
    check: called with each one read; raises ConfigError for what cannot work.
    on_error: called with a ConfigError before it is raised; a launcher exits here.
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


def _flops(stock):
  from maxtext_mudd.model import reporting

  return reporting.with_connection_flops(stock)


def _metrics(stock):
  from maxtext_mudd.model import reporting

  return reporting.with_connection_metrics(stock)


SEAMS = (
  Seam("maxtext.configs.pyconfig", "_initialize_pydantic", ("argv", "config_class", "kwargs"), _read_mudd_config),
  Seam(
    "maxtext.models.models",
    "NNXDecoder",
    ("self", "layer_cls", "rngs", "base_name", "i", "layer_kwargs"),
    _mudd_decoder,
    method="_create_and_register_layer",
  ),
  Seam(
    "maxtext.models.models",
    "Embed",
    ("self", "num_embeddings", "num_features", "config", "mesh"),
    _embedding,
    method="__init__",
  ),
  Seam("maxtext.utils.maxtext_utils", "calculate_tflops_training_per_device", ("config", "log"), _flops),
  Seam(
    "maxtext.trainers.pre_train.train",
    "record_activation_metrics",
    ("output_metrics", "intermediate_outputs", "config"),
    _metrics,
  ),
)

_installed = False
_reading = Reading()


def install(reading: Reading | None = None) -> None:
  """Makes MaxText know the `mudd_*` keys. Once is enough; more often changes `reading` only.

  Raises:
    versions.UnknownMaxText: not a known version, or a replaced attribute has another shape; nothing is replaced then.
  """
  global _installed, _reading
  _reading = reading or _reading
  if _installed:
    return
  versions.check()
  stock = [seam.stock() for seam in SEAMS]
  replacements = [seam.replace(attribute) for seam, attribute in zip(SEAMS, stock)]
  for seam, replacement in zip(SEAMS, replacements):
    setattr(importlib.import_module(seam.module), seam.name, replacement)
  _installed = True
