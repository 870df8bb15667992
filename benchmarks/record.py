"""Runs each measurement in a separate process, and writes result files that state how to reproduce them."""

from collections.abc import Sequence
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The environment of a process that compiles for TPUs and opens no device.
COMPILE_ONLY = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class MeasurementError(ValueError):
  """A measurement that could not be made, or a compiler's output that could not be read; one sentence."""


def in_own_process(script: str, name: str, arguments: list[str], init_args: str = "") -> dict:
  """Runs `script _one ARGUMENTS` in a separate process, and returns the JSON that it prints last.

  The process has to be a separate one because libtpu reads its flags only once, when it is loaded.

  Args:
    name: what is measured, for messages.
    init_args: flags of libtpu.

  Raises:
    MeasurementError: the process failed.
  """
  environment = os.environ | COMPILE_ONLY | {"LIBTPU_INIT_ARGS": init_args}
  command = [sys.executable, script, "_one", *arguments]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  if done.returncode:
    raise MeasurementError(f"{name}: {error_line(done.stderr)}")
  return json.loads(done.stdout.splitlines()[-1])


def error_line(trace: str) -> str:
  """The message of the exception at the end of a traceback."""
  lines = [x for x in trace.splitlines() if x.strip()]
  messages = [x.partition(": ")[2] for x in lines if re.match(r"[\w.]+Error: ", x)]
  return (messages or lines or ["the process failed and printed nothing."])[-1]


def facts(
  hardware: str, label: str = "chips", packages: Sequence[str] = ("jax", "jaxlib", "libtpu", "maxtext")
) -> dict[str, str]:
  """What a result depends on: command, date, hardware, commit and versions. Call it before the measurement.

  Args:
    hardware: the hardware in words.
    label: the label of the hardware in the results, such as "chips".
    packages: packages whose versions the results state.
  """
  script = pathlib.Path(sys.argv[0]).resolve().relative_to(ROOT)
  arguments = list(sys.argv[1:])
  if "--keep" in arguments:  # it names a folder of this machine, which does not influence the result
    at = arguments.index("--keep")
    del arguments[at : at + 2]
  return {
    "command": shlex.join(["python", str(script), *arguments]),
    "date": datetime.date.today().isoformat(),
    label: hardware,
    "commit": commit(),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def commit() -> str:
  """The commit of the maxtext_mudd that is imported, and whether its files have been changed since."""
  folder = pathlib.Path(importlib.util.find_spec("maxtext_mudd").origin).parents[1]
  if not shutil.which("git"):
    return "unknown"

  def git(*arguments):
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True).stdout.strip()

  changed = git("status", "--porcelain", "--", "maxtext_mudd", "yaml")
  return (git("rev-parse", "--short", "HEAD") or "unknown") + (", with changes not committed" if changed else "")


def table(columns: list[str], rows: list[list[str]]) -> str:
  """A Markdown table."""
  return "".join("| " + " | ".join(line) + " |\n" for line in (columns, ["---"] * len(columns), *rows))


def write(name: str, about: dict[str, str], text: str, rows: list[dict]) -> pathlib.Path:
  """Writes results/NAME.md and results/NAME.json, or PATH.md and PATH.json if the name is a path.

  Args:
    about: what `facts` returned.
    text: the body of the .md file.
    rows: the rows of the .json file.

  Returns:
    The path of both files without their endings.
  """
  place = pathlib.Path(name).absolute() if len(pathlib.Path(name).parts) > 1 else RESULTS / name
  place.parent.mkdir(parents=True, exist_ok=True)
  head = "".join(f"- {key}: {f'`{value}`' if key == 'command' else value}\n" for key, value in about.items())
  place.with_name(f"{place.name}.md").write_text(f"# {place.name}\n\n{head}\n{text}")
  place.with_name(f"{place.name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
  return place


def default_name(what: str, config: str, device: str) -> str:
  """The default name of results: date, measurement, model and device."""
  short = "cpu" if device.startswith("CPU") else "-".join(device.lower().replace("×", "x").split())
  model = pathlib.Path(config).stem.replace("_", "-")
  return f"{datetime.date.today().isoformat()}-{what}-{model}-{short}"


def caution(device: str) -> str:
  """The warning above figures of a CPU; empty for other devices."""
  if not device.startswith("CPU"):
    return ""
  return "**Measured on a CPU.** It shows that the tool works, and nothing about an accelerator or the paper.\n\n"


def gigabytes(size: int | None) -> str:
  return "n/a" if size is None else f"{size / 1e9:.3g}"


def say(line: str) -> None:
  """Prints progress to stderr; stdout is for results."""
  print(line, file=sys.stderr, flush=True)
