"""Refuses values of MaxText's keys with which MaxText's trainer would fail late, train nothing, or not start.

Each generator below yields pairs: whether a setting is unusable, and the sentence that refuses it.
"""

from collections.abc import Iterable, Iterator
import importlib.util
import os
import pathlib

from maxtext_mudd.config.errors import ConfigError

_PRODUCT_NAME = pathlib.Path("/sys/class/dmi/id/product_name")  # google.auth reads it to recognize Google's machines
_SEED_LIMIT = 2**32  # Grain takes smaller seeds only


def check(config, trainer_settings: Iterable[tuple[bool, str]] | None = None) -> None:
  """Raises ConfigError for the first setting of a training run that cannot work.

  Args:
    trainer_settings: pairs, as the generators of this module yield them, for another trainer than that of pre-training.
  """
  of_trainer = _of_pre_training(config) if trainer_settings is None else trainer_settings
  for is_unusable, sentence in (*_on_any_machine(config), *of_trainer, *_without_google_cloud(config)):
    if is_unusable:
      raise ConfigError(sentence)


def _on_any_machine(config) -> Iterator[tuple[bool, str]]:
  """Settings that no machine can train with."""
  for key, meaning, is_read in (
    ("steps", "a number of steps to train for", True),
    ("checkpoint_period", "a number of steps between checkpoints", config.enable_checkpointing),
    ("log_period", "a number of steps between two flushes of the log", True),
    ("num_epoch", "a number of passes over the data", config.dataset_type.value != "synthetic"),
    ("profiler_steps", "a number of steps to profile", bool(config.profiler)),
  ):
    value = getattr(config, key)
    yield is_read and value < 1, f"{key}={value} is not {meaning}; set it to 1 or more."
  workers = config.grain_worker_count
  yield (
    workers < -1,
    f"grain_worker_count={workers} is not a number of processes; set it to 0 or more, or -1 for MaxText's choice.",
  )
  seed = config.data_shuffle_seed
  yield (
    config.enable_data_shuffling and not 0 <= seed < _SEED_LIMIT,
    f"data_shuffle_seed={seed} is not a seed that data can be shuffled with; set it to 0 or more, below {_SEED_LIMIT}.",
  )


def _of_pre_training(config) -> Iterator[tuple[bool, str]]:
  """Settings that pre-training does not work with."""
  yield (
    config.use_dpo,
    "use_dpo=True does not work with pre-training; start python3 -m maxtext_mudd.post_train dpo instead, or set "
    "use_dpo=False.",
  )
  yield (
    config.lora.enable_lora,
    "lora.enable_lora=True does not work with pre-training: MaxText adds no adapters to the model there, and so trains "
    "and saves nothing; start python3 -m maxtext_mudd.post_train sft instead, or set lora.enable_lora=False.",
  )


def _without_google_cloud(config) -> Iterator[tuple[bool, str]]:
  """Settings that need Google Cloud, on a machine that cannot reach it."""
  import jax
  from maxtext.common import gcloud_stub

  if jax.process_index():
    return  # only MaxText's first process sends anything to Google Cloud
  # Without this module MaxText measures no goodput, and needs no credentials.
  measures_goodput = importlib.util.find_spec("ml_goodput_measurement") is not None
  for key in ("enable_goodput_recording", "monitor_goodput"):
    yield (
      getattr(config, key) and measures_goodput and not _may_have_credentials(),
      f"{key}=True needs Google Cloud's credentials, and this machine has none; run `gcloud auth application-default "
      f"login`, or set {key}=False.",
    )
  output = config.base_output_directory
  uploads_metrics = config.gcs_metrics and not gcloud_stub.is_decoupled()
  yield (
    uploads_metrics and not output.startswith("gs://"),
    f"gcs_metrics=True uploads to Cloud Storage, and base_output_directory={output} is not there; set it to "
    "gs://BUCKET, or set gcs_metrics=False.",
  )
  yield (
    uploads_metrics and not _may_have_credentials(),
    "gcs_metrics=True needs Google Cloud's credentials, and this machine has none; run `gcloud auth "
    "application-default login`, or set gcs_metrics=False.",
  )


def _may_have_credentials() -> bool:
  """Whether google.auth may find default credentials, decided without a network.

  google.auth reads the file that GOOGLE_APPLICATION_CREDENTIALS names, then the file that gcloud writes. On Google's
  machines, where pods of Kubernetes may run, it also asks a server, unless NO_GCE_CHECK=true.
  """
  environment = os.environ
  if "GOOGLE_APPLICATION_CREDENTIALS" in environment:
    return os.path.isfile(environment["GOOGLE_APPLICATION_CREDENTIALS"])
  # Path.home would raise for users without a home folder.
  gcloud = pathlib.Path(environment.get("CLOUDSDK_CONFIG") or os.path.expanduser("~/.config/gcloud"))
  if (gcloud / "application_default_credentials.json").is_file():
    return True
  if environment.get("NO_GCE_CHECK") == "true":
    return False
  if any(name in environment for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "KUBERNETES_SERVICE_HOST")):
    return True
  return _PRODUCT_NAME.is_file() and _PRODUCT_NAME.read_text().startswith("Google")
