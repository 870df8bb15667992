"""What the processes of a job of several hosts agree on, so that none waits for one that has ended."""

from maxtext_mudd.config.errors import ConfigError

MEETING_SECONDS = 60


def refuse_together(refusal: ConfigError | None) -> None:
  """Raises on all hosts where one host refuses a run.

  JAX lets a process that ends wait for the others, and aborts all of them after five minutes. Every host calls this
  once, before it trains.

  Args:
    refusal: what this host refuses the run for, if it does.

  Raises:
    ConfigError: `refusal`; or that of another host was raised there.
  """
  import jax
  from jax.experimental import multihost_utils
  import numpy as np

  refusing = np.atleast_1d(refusal is not None)
  if jax.process_count() > 1:
    refusing = multihost_utils.process_allgather(refusing).reshape(-1)
  if refusal:
    raise refusal
  if refusing.any():
    raise ConfigError(f"process {int(refusing.argmax())} of this job refuses the run; its log says why.")


def meet(what: str, seconds: float = MEETING_SECONDS) -> bool:
  """Waits until all hosts are here; False if one does not come in time.

  Collectives would abort the job where a host is in another one, so this asks JAX's coordinator, which has no public
  interface in JAX 0.11; Orbax waits for hosts in the same way.

  Args:
    what: names the meeting; each name is used once.
  """
  import jax
  from jax._src import distributed

  if jax.process_count() == 1:
    return True
  try:
    distributed.global_state.client.wait_at_barrier(f"maxtext-mudd-{what}", timeout_in_ms=int(1000 * seconds))
  except jax.errors.JaxRuntimeError:
    return False
  return True
