"""Lets the processes of a job on several hosts end together, so that none waits for one that has ended."""

from maxtext_mudd.config.errors import ConfigError

WAIT_SECONDS = 60


def refuse_together(refusal: ConfigError | None) -> None:
  """Raises on all hosts if one host refuses the run. Every host calls this once, before it trains.

  Without it, JAX lets a process that ends wait for the others, and aborts all of them after five minutes.

  Args:
    refusal: why this host refuses the run, or None.

  Raises:
    ConfigError: `refusal`, or, if another host refuses the run, a sentence that names its process.
  """
  import jax
  from jax.experimental import multihost_utils
  import numpy as np

  has_refused = np.atleast_1d(refusal is not None)
  if jax.process_count() > 1:
    has_refused = multihost_utils.process_allgather(has_refused).reshape(-1)
  if refusal:
    raise refusal
  if has_refused.any():
    raise ConfigError(f"process {int(has_refused.argmax())} of this job refuses the run; its log says why.")


def wait_for_all(barrier: str, seconds: float = WAIT_SECONDS) -> bool:
  """Waits until all hosts have called this function; returns False if one of them does not in time.

  A collective operation of JAX would abort the job if another host runs a different one. So this function asks JAX's
  coordinator, which has no public interface in JAX 0.11. Orbax waits for hosts in the same way.

  Args:
    barrier: a name that all hosts pass. Each name can be used once.
  """
  import jax
  from jax._src import distributed

  if jax.process_count() == 1:
    return True
  try:
    distributed.global_state.client.wait_at_barrier(f"maxtext-mudd-{barrier}", timeout_in_ms=int(1000 * seconds))
  except jax.errors.JaxRuntimeError:
    return False
  return True
