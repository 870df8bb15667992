"""What the launcher says of a run that it refuses."""

import sys

import pytest

from maxtext_mudd import plugin, train
from tests import runs


def refuse(argv, monkeypatch, capsys) -> str:
  """Runs the launcher in this process; the one sentence it ends with."""
  monkeypatch.setattr(sys, "argv", ["MaxText/train.py", *argv])
  try:
    with pytest.raises(SystemExit) as ended:
      train.run()
  finally:
    plugin.install(plugin.Reading())  # the launcher's would exit from later tests
  assert ended.value.code == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maxtext-mudd: ")]
  assert len(lines) == 1
  return lines[0].removeprefix("maxtext-mudd: ")


def refused_run(overrides, corpus, tmp_path, monkeypatch, capsys) -> str:
  """The sentence with which a small run ends that has a mistake among its keys; it must have written nothing.

  Args:
    overrides: key=value arguments, of which the last counts where a key is given twice.
    corpus: the keys of a corpus.
  """
  overrides = [f"base_output_directory={tmp_path / 'out'}", "run_name=x", *corpus, *overrides]
  keys = [override.split("=")[0] for override in overrides]
  overrides = [o for i, o in enumerate(overrides) if o.split("=")[0] not in keys[i + 1 :]]
  sentence = refuse([runs.RUN_YML, *overrides], monkeypatch, capsys)
  assert not (tmp_path / "out").exists()
  return sentence
