"""Values of MaxText's keys with which its trainer fails late, trains nothing, or cannot start: refused before."""

from collections.abc import Iterator
import importlib.util
import os
import pathlib

from maxtext_mudd.config.errors import ConfigError

_MACHINE = pathlib.Path("/sys/class/dmi/id/product_name")  # where google.auth looks, too
_SEEDS = 2**32  # Grain's limit


def check(config) -> None:
  """Raises ConfigError for the first setting of a training run that cannot work."""
  for is_on, sentence in (*_values(config), *_services(config)):
    if is_on:
      raise ConfigError(sentence)


def _values(config) -> Iterator[tuple[bool, str]]:
  """Settings that no machine can train with: whether each is on, and the sentence."""
  for key, meaning, is_read in (
    ("steps", "a number of steps to train for", True),
    ("checkpoint_period", "a number of steps between checkpoints", config.enable_checkpointing),
    ("log_period", "a number of steps between two flushes of what is logged", True),
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
    config.enable_data_shuffling and not 0 <= seed < _SEEDS,
    f"data_shuffle_seed={seed} is not a seed that data can be shuffled with; set it to 0 or more, below {_SEEDS}.",
  )
  yield (
    config.use_dpo,
    "use_dpo=True does not work with pre-training; use MaxText's post-training trainer, "
    "maxtext.trainers.post_train.dpo.train_dpo, or set use_dpo=False.",
  )
  yield (
    config.lora.enable_lora,
    "lora.enable_lora=True does not work with pre-training, where MaxText adds no adapters to the model and so trains "
    "and saves nothing; set lora.enable_lora=False.",
  )


def _services(config) -> Iterator[tuple[bool, str]]:
  """Settings that need Google Cloud: whether each is on and cannot work here, and the sentence."""
  import jax
  from maxtext.common import gcloud_stub

  if jax.process_index():
    return  # MaxText's first process alone speaks to Google Cloud
  measures = importlib.util.find_spec("ml_goodput_measurement") is not None  # MaxText does without it
  for key in ("enable_goodput_recording", "monitor_goodput"):
    yield (
      getattr(config, key) and measures and not _may_have_credentials(),
      f"{key}=True needs Google Cloud's credentials, and this machine has none; run `gcloud auth application-default "
      f"login`, or set {key}=False.",
    )
  uploads, output = config.gcs_metrics and not gcloud_stub.is_decoupled(), config.base_output_directory
  yield (
    uploads and not output.startswith("gs://"),
    f"gcs_metrics=True uploads to Cloud Storage, where base_output_directory={output} is not; set that to gs://BUCKET, "
    "or set gcs_metrics=False.",
  )
  yield (
    uploads and not _may_have_credentials(),
    "gcs_metrics=True needs Google Cloud's credentials, and this machine has none; run `gcloud auth "
    "application-default login`, or set gcs_metrics=False.",
  )


def _may_have_credentials() -> bool:
  """Whether google.auth could find default credentials, by what can be seen without a network.

  It looks at the file that GOOGLE_APPLICATION_CREDENTIALS names, then at the file that gcloud writes, and asks a server
  on Google's machines, unless NO_GCE_CHECK=true. Pods of Kubernetes may be on these.
  """
  environment = os.environ
  if "GOOGLE_APPLICATION_CREDENTIALS" in environment:
    return os.path.isfile(environment["GOOGLE_APPLICATION_CREDENTIALS"])
  # Not Path.home, which raises for users without a home folder.
  gcloud = pathlib.Path(environment.get("CLOUDSDK_CONFIG") or os.path.expanduser("~/.config/gcloud"))
  if (gcloud / "application_default_credentials.json").is_file():
    return True
  if environment.get("NO_GCE_CHECK") == "true":
    return False
  if any(name in environment for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "KUBERNETES_SERVICE_HOST")):
    return True
  return _MACHINE.is_file() and _MACHINE.read_text().startswith("Google")
