"""What the launcher says of a run that it refuses."""

import sys

import pytest

from maxtext_mudd import plugin, train


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
