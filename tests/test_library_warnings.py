"""Commands on good runs print their results, and no warnings that ask nothing of anybody."""

import logging
import re
import subprocess
import sys
import warnings

import pytest

from maxtext_mudd.runs import library_warnings
from tests import runs

KNOWN = (
  "ParamInfo(name='layers.0') created with ts_context=None. Passing unshared or default TensorStore contexts",
  "Metadata file does not exist: /runs/a/checkpoints/160/items/_CHECKPOINT_METADATA",
  "Failed to resolve handler for checkpointable: 'tokenizer'. Attempting to load using pytree handler.",
  "Failed to get metadata for checkpointable: remote_code due to incompatible handler: <object>",
)
OTHERS = (
  "Metadata file does not exist: /runs/a/checkpoints/160/_CHECKPOINT_METADATA",
  "Failed to get metadata for checkpointable: items due to incompatible handler",
)


def test_known_warnings_of_libraries(caplog):
  with library_warnings.hidden():
    for message in (*KNOWN, *OTHERS):
      logging.getLogger("absl").warning(message)
  assert caplog.messages == list(OTHERS)
  logging.getLogger("absl").warning(KNOWN[0])
  assert caplog.messages[-1] == KNOWN[0]


def test_known_warnings_of_python():
  with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    with library_warnings.hidden():
      warnings.warn("Some donated buffers were not usable: float32[16,4,1,32]", stacklevel=1)
      warnings.warn("Some other buffers were not usable", stacklevel=1)
  assert [str(warning.message) for warning in seen] == ["Some other buffers were not usable"]


def test_known_lines(capsys):
  with library_warnings.hidden():
    print("[NO-OP] jetstream: dependency missing (No module named 'jetstream'); using stubs.")
    print("a ta", end="")
    print("ble\nof results")
    print("no end", end="")
  assert capsys.readouterr().out == "a table\nof results\nno end"


@pytest.mark.slow
def test_decode_and_evaluate_print_their_results_alone(tmp_path):
  overrides = runs.build_corpus(tmp_path)
  runs.train(runs.LAUNCHER, runs.RUN_YML, tmp_path, "run", *overrides, "steps=2")
  checkpoint = tmp_path / "run" / "checkpoints" / "1"
  text = tmp_path / "text.txt"
  text.write_text("def f(x):\n  return x\n")
  decoding = ["MaxText/decode.py", runs.RUN_YML, f"load_parameters_path={checkpoint}", "prompt=def "]
  decoding += ["max_prefill_predict_length=8"]
  evaluation = ["-m", "maxtext_mudd.evaluate", "--checkpoint", str(checkpoint), runs.RUN_YML, "--text", str(text)]
  for command, begins in ((decoding, "Input `def ` -> `"), (evaluation, "|Tasks|")):
    finished = subprocess.run(
      [sys.executable, *command], cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(begins)
    # lm-evaluation-harness draws bars of its progress there.
    assert not [line for line in finished.stderr.splitlines() if line and not re.search(r"\d+%\|.*\|", line)]
