"""`convert`: what it refuses, and what interrupts and errors leave behind: nothing."""

import contextlib
import re
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxtext_mudd import convert
from maxtext_mudd.checkpoints import model_folder, staging
from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.config import errors
from maxtext_mudd.config.errors import ConfigError
from tests import models, runs
from tests.published import LAYOUTS, hugging_face, refusal


def test_targets_are_never_written_over(tmp_path, capsys):
  source, target, made = hugging_face(tmp_path / "hf"), tmp_path / "there", tmp_path / "made"
  target.mkdir()
  hf.from_hf(source, made, {})
  capsys.readouterr()
  for command in (
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", str(target)],
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", "gs://bucket/m"],
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", f"{tmp_path}/model/"],
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", str(target), "scan_layers"],
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", str(target), "mudd_wayz=1"],
    ["to-hf", "--maxtext-dir", str(target), "--hf-dir", str(source)],
    ["to-hf", "--maxtext-dir", str(made), "--hf-dir", str(source)],
    ["from-hf", "--hf-dir", str(source), "--maxtext-dir", str(tmp_path / "new"), "head_dim=32"],
    [
      "from-hf",
      "--hf-dir",
      str(source),
      "--maxtext-dir",
      str(tmp_path / "new"),
      "scan_layers=true",
      "mudd_ffn_groups=2",
    ],
  ):
    with pytest.raises(SystemExit) as ended:
      convert.main(command)
    assert ended.value.code == 2
  said = [
    x.removeprefix("maxtext-mudd: ") for x in capsys.readouterr().err.splitlines() if x.startswith("maxtext-mudd")
  ]
  assert said == [
    f"{target} exists already; name a folder that does not.",
    "gs://bucket/m is not a local folder; copy it first.",
    f"--maxtext-dir {tmp_path}/model/: MaxText cannot load parameters from a folder that is called model; choose "
    "another name.",
    "scan_layers is not key=value; write it like scan_layers=true.",
    "mudd_wayz is not a configuration key; the nearest is mudd_ways.",
    f"{target} has no model.yml; name a folder that from-hf or from-run made.",
    f"{source} exists already; name a folder that does not.",
    f"head_dim=32: the model in {source} has head_dim=16; leave it out.",
    f"mudd_ffn_groups=2: the model in {source} has FFNs of other widths; leave it out, and each gets a group of its "
    "own.",
  ]
  assert not list(target.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_that_libraries_swallow(number, tmp_path):
  with pytest.raises(KeyboardInterrupt), staging.staged(tmp_path / "made"), contextlib.suppress(KeyboardInterrupt):
    signal.raise_signal(number)
  assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
  source = hugging_face(tmp_path / "hf")

  save = model_folder.save

  def stop(*arguments):
    save(*arguments)
    raise KeyboardInterrupt

  monkeypatch.setattr(model_folder, "save", stop)
  with pytest.raises(KeyboardInterrupt):
    hf.from_hf(source, tmp_path / "new" / "deep" / "maxtext", {})
  assert [x.name for x in tmp_path.iterdir()] == ["hf"]


def test_what_a_killed_conversion_left_is_removed(tmp_path):
  for name in (".m[1].partial", ".m1.partial"):
    (tmp_path / name / "made.orbax-checkpoint-tmp" / "items").mkdir(parents=True)
  (tmp_path / ".m[1].partial" / "made").mkdir()
  with staging.staged(tmp_path / "m[1]") as stage:
    assert sorted(x.name for x in tmp_path.iterdir()) == [".m1.partial", ".m[1].partial"]
    assert [x for x in stage.parent.iterdir() if not x.name.startswith(".")] == [stage]
    assert not list(stage.iterdir())
  assert sorted(x.name for x in tmp_path.iterdir()) == [".m1.partial", "m[1]"]


def test_two_conversions_to_one_folder(tmp_path):
  """The second is refused while the first lives, and touches nothing; targets with alike names are others."""
  with staging.staged(tmp_path / "m.partial2") as other, staging.staged(tmp_path / "m") as stage:
    (other / "a").write_text("")
    (stage / "b").write_text("")
    with (
      pytest.raises(ConfigError, match=r"/m is being written by another process; wait for it, or name another folder"),
      staging.staged(tmp_path / "m"),
    ):
      pass
    code = "import pathlib, sys; from maxtext_mudd.checkpoints import locks\n"
    code += "with locks.exclusive_folder(*map(pathlib.Path, sys.argv[1:])): pass"
    command = [sys.executable, "-c", code, str(tmp_path / ".m.partial"), str(tmp_path / "m")]
    finished = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True)
    assert "ConfigError" in finished.stderr and "is being written by another process" in finished.stderr
  assert [str(x.relative_to(tmp_path)) for x in sorted(tmp_path.rglob("*"))] == [
    "m",
    "m/b",
    "m.partial2",
    "m.partial2/a",
  ]


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (OSError(28, "No space left on device"), "made cannot be written (No space left on device); name a folder that"),
    (PermissionError(13, "Permission denied", "{}/made"), "made cannot be written (Permission denied); name a folder"),
    (PermissionError(13, "Permission denied", "/hf/merges.txt"), "/hf/merges.txt cannot be read (Permission denied)"),
  ],
)
def test_what_cannot_be_read_or_written_is_named(error, message, tmp_path):
  if error.filename:
    error.filename = error.filename.format(tmp_path)
  with pytest.raises(ConfigError, match=re.escape(message)), staging.staged(tmp_path / "made"):
    raise error
  assert not list(tmp_path.iterdir())


def test_hosts_that_jax_was_not_to_have(monkeypatch):
  def unknown(backend):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(model_folder.jax, "local_devices", unknown)
  with pytest.raises(ConfigError, match=r"JAX_PLATFORMS=\S+ leaves out cpu, .*; set JAX_PLATFORMS=\S+,cpu\."):
    model_folder.cpu_device()


INTERRUPT = """
import pathlib, signal, sys, threading, time
from maxtext_mudd import plugin
plugin.install()
from maxtext_mudd.checkpoints.hugging_face import models as hf

source, target = map(pathlib.Path, sys.argv[1:])

def watch():
  while not list(target.parent.glob(".*.partial/*.orbax-checkpoint-tmp*")):
    time.sleep(0.0005)
  signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

threading.Thread(target=watch, daemon=True).start()
hf.from_hf(source, target, {})
"""


@pytest.mark.slow
def test_an_interrupt_while_orbax_writes_leaves_nothing(tmp_path):
  command = [sys.executable, "-c", INTERRUPT, str(models.DATA / "muddformer_tiny"), str(tmp_path / "new" / "maxtext")]
  finished = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True)
  assert finished.stderr.rstrip().endswith("KeyboardInterrupt")
  assert finished.stderr.count("Traceback") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ConfigError("The configuration cannot be read."), AttributeError("'NoneType'")])
def test_interrupts_that_end_in_other_errors(error, tmp_path, monkeypatch, capsys):
  def convert_it(*_, **__):
    with contextlib.suppress(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    raise error

  monkeypatch.setattr(hf, "from_hf", convert_it)
  assert refusal(capsys, "from-hf", "--hf-dir", hugging_face(tmp_path / "hf"), "--maxtext-dir", tmp_path / "m") == (
    "interrupted; nothing was written."
  )
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_folders_for_other_commands(tmp_path, capsys):
  source, run_folder = hugging_face(tmp_path / "hf"), tmp_path / "runs" / "r"
  for step in (7, 12):
    (run_folder / "checkpoints" / str(step) / "items").mkdir(parents=True)
  (tmp_path / "empty").mkdir()
  jax_code = models.DATA / "muddjax_plain"
  commands = {"from-hf": "--hf-dir", "from-fork": "--fork-dir", "from-run": "--checkpoint"}
  wanted = "name a checkpoint, such as OUTPUT/RUN/checkpoints/STEP."
  newest = f"is the folder of a run; name one of its checkpoints, such as {run_folder}/checkpoints/12."
  for command, path, message in (
    ("from-hf", tmp_path / ("n" * 300), "cannot be reached: file name too long; name one that can."),
    ("from-hf", jax_code, "is a folder of the authors' JAX code or of a run; convert it by from-fork or from-run."),
    ("from-fork", source, "is a Hugging Face folder; convert it by from-hf."),
    ("from-fork", tmp_path / "empty", "holds no parameters; name a folder with params.safetensors or an Orbax tree."),
    ("from-run", source, "is a Hugging Face folder; convert it by from-hf."),
    ("from-run", jax_code, "is a folder of the authors' JAX code; convert it by from-fork."),
    ("from-run", run_folder, newest),
    ("from-run", run_folder / "checkpoints", newest),
    ("from-run", tmp_path / "empty", f"holds no parameters; {wanted}"),
    ("from-run", tmp_path / "none", f": there is no such folder; {wanted}"),
  ):
    more = [runs.RUN_YML] if command == "from-run" else []
    said = refusal(capsys, command, commands[command], path, "--maxtext-dir", tmp_path / "m", *more)
    assert said == f"{path}{'' if message.startswith(':') else ' '}{message}"
  for folders in (("", tmp_path / "m"), (source, "")):
    said = refusal(capsys, "from-hf", "--hf-dir", folders[0], "--maxtext-dir", folders[1])
    assert said == f"--{'maxtext' if folders[0] else 'hf'}-dir '' names no folder; name one."


def test_keys_that_are_no_model_s(tmp_path, capsys):
  source, made = hugging_face(tmp_path / "hf"), tmp_path / "m"
  no_model = (
    "model.yml describes a model, to which {0} does not belong; leave it out, and set it where the model is used."
  )
  for key, message in (
    ("load_parameters_path=/x", f"load_parameters_path=/x: {no_model}"),
    ("run_name=a/b", f"run_name=a/b: {no_model}"),
    ("steps=0", f"steps=0: {no_model}"),
    ("tokenizer_path=nowhere", f"tokenizer_path=nowhere: {no_model}"),
    ("base_config=other.yml", f"base_config=other.yml: the model in {source} has base_config=base.yml; leave it out."),
    ("mudd_ffn_groups=2", f"mudd_ffn_groups=2: the model in {source} has FFNs of other widths; leave it out."),
    (
      "mudd_kernel=nope",
      "mudd_kernel='nope' is not valid: input should be 'auto', 'xla', 'pallas' or 'pallas_interpret'.",
    ),
  ):
    said = refusal(capsys, "from-hf", "--hf-dir", source, "--maxtext-dir", made, key)
    assert said == message.format(key.split("=")[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_run_leaves_the_layout(layout, tmp_path, capsys):
  name = {"single": "layers_0", "scanned": "layers"}[layout]
  tree = {"params": {"params": {"decoder": {name: {"mlp": np.zeros(3, np.float32)}}}}}
  ocp.PyTreeCheckpointer().save(tmp_path / "r" / "items", tree)
  wanted = layout == "single"
  command = ["from-run", "--checkpoint", tmp_path / "r", "--maxtext-dir", tmp_path / "m", runs.RUN_YML]
  said = refusal(capsys, *command, *(["scan_layers=true"] if wanted else []))
  assert said == (
    f"scan_layers={wanted}: {tmp_path}/r/items has {layout} layers, and from-run keeps the layout; set scan_layers="
    f"{str(not wanted).lower()}, or convert the run first (layout)."
  )
  assert [x.name for x in tmp_path.iterdir()] == ["r"]


def test_brief_errors_have_no_tails():
  for tail in (
    ". See full TensorStore details: <bound method pybind11_detail_function",
    " [source locations='tensorstore/kvstore/x.cc:1']",
  ):
    assert errors.brief(ValueError(f"cannot read x{tail}")) == "ValueError: cannot read x"


def test_interrupts_while_maxtext_is_imported(tmp_path, monkeypatch, capsys):
  """Its modules cannot be imported once more."""
  calls = []

  def install(reading):
    calls.append(reading)
    signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(convert.plugin, "install", install)
  assert refusal(capsys, "to-hf", "--maxtext-dir", tmp_path, "--hf-dir", "b") == "interrupted; nothing was written."
  assert len(calls) == 1
