"""Two processes of one job: what one of them refuses ends both, and neither waits for long."""

import socket
import subprocess
import sys

from tests import runs

PROGRAM = """
import sys
import jax

jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.runs import hosts

assert hosts.wait_for_all("both", 60)
if sys.argv[1] == "0":
  assert not hosts.wait_for_all("alone", 2)
try:
  hosts.refuse_together(ConfigError("its own reason.") if sys.argv[1] == "1" else None)
except ConfigError as error:
  print(error, flush=True)
  sys.exit(2)
"""


def test_a_refusal_of_one_host_ends_all():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    program = PROGRAM.replace("{port}", str(free.getsockname()[1]))
  environment = runs.environment(PYTHONPATH=str(runs.ROOT), XLA_FLAGS="", JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo")
  processes = [
    subprocess.Popen([sys.executable, "-c", program, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  printed = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
  assert [process.returncode for process in processes] == [2, 2]
  assert printed == ["process 1 of this job refuses the run; its log says why.", "its own reason."]
