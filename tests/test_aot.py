"""benchmarks/aot.py: which models it compiles for which pods, and its table, with what does not fit."""

import json
import sys

import pytest

from tests import runs

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import aot
import record

from maxtext_mudd.config import versions

GB = 10**9


@pytest.fixture
def rows(monkeypatch, tmp_path, capsys):
  """Runs it on compilations that are stood in for: stock takes 50 s and 6 GB, MUDD half as much again; single layers
  with connections do not fit."""
  asked = []

  def compiled(script, name, arguments, init_args):
    model, topology, scan, mudd, keys = json.loads(arguments[0])
    asked.append((model, topology, scan, mudd, keys))
    row = {"model": model, "topology": topology, "scan_layers": scan, "mudd": mudd}
    if mudd and not scan:
      return row | {"does_not_fit": "it needs 40G of the chip's 31.25G, 8.75G too much."}
    share = 1.5 if mudd else 1.0
    sizes = {"argument_bytes": 4 * GB, "temporary_bytes": share * 6 * GB}
    sizes |= {"hbm_bytes": share * 60 * GB, "floor_bytes": 24 * GB if mudd else 0}
    if "ici_pipeline_parallelism" in keys:
      sizes |= {"sent_bytes": (22 if mudd else 4) * GB, "ring_bytes": (2 if mudd else 4) * GB}
      sizes |= {"beside_blocks_bytes": 2 * GB}
      sizes |= {"planned_bytes": 20 * GB} if mudd else {}
    return row | {"per_device_batch_size": 4.0, "compile_seconds": 50 * share, **sizes}

  monkeypatch.setattr(record, "in_own_process", compiled)
  monkeypatch.setattr(versions, "missing_libtpu", lambda: None)
  monkeypatch.setattr(record, "facts", lambda hardware: {"chips": hardware})
  monkeypatch.setattr(record, "RESULTS", tmp_path)

  def run(*arguments):
    asked.clear()
    monkeypatch.setattr(sys, "argv", ["aot.py", *arguments])
    status = aot.main()
    return status, list(asked), capsys.readouterr()

  return run


def test_the_models_and_their_pods(rows):
  _, asked, _ = rows()
  pods = {("405m", "v5p-16"), ("405m", "v6e-8"), ("1p4b", "v5p-32"), ("2p8b", "v5p-128"), ("6p9b", "v5p-128")}
  scanned = {(model, pod, True, mudd) for model, pod in pods for mudd in (False, True)}
  single = {("405m", pod, False, mudd) for pod in ("v5p-16", "v6e-8") for mudd in (False, True)}
  assert {case[:4] for case in asked} == scanned | single
  assert len(asked) == len(scanned | single)


def test_the_table(rows, tmp_path):
  status, asked, printed = rows("--models", "405m", "--output", "mine", "remat_policy=minimal")
  assert status == 0
  assert all(keys == {"remat_policy": "minimal"} for *_, keys in asked)
  written = (tmp_path / "mine.md").read_text()
  assert "| 405m, batch 4 | v5p-16 | scanned | MUDD | 75 | 1.50 | 4.00 | 9.00 | 1.50 | 90 | 1.25 | 13 % |" in written
  assert "| 405m | v6e-8 | single | MUDD | - | - | - | - | - | - | - | does not fit |" in written
  assert "- 405m on v6e-8: it needs 40G of the chip's 31.25G, 8.75G too much." in written
  assert "8.75G too much" in printed.err
  assert len(json.loads((tmp_path / "mine.json").read_text())["rows"]) == 8


def test_models_by_name(rows):
  _, asked, _ = rows("--models", "gemma3-12b")
  assert [case[:4] for case in asked] == [("gemma3-12b", "v5p-64", True, mudd) for mudd in (False, True)]


def test_pipelines(rows, tmp_path):
  """Stages of equally many blocks, of stock and MUDD alike, and no single layers."""
  _, asked, _ = rows("--models", "405m,llama2-70b", "--pipeline", "4", "--microbatches", "8", "--output", "mine")
  assert [case[:4] for case in asked[:2]] == [("405m", "v5p-16", True, mudd) for mudd in (False, True)]
  assert {case[2] for case in asked} == {True}
  for model, *_, keys in asked:
    assert keys["num_layers_per_pipeline_stage"] == {"405m": 6, "llama2-70b": 20}[model]
    assert (keys["ici_pipeline_parallelism"], keys["num_pipeline_microbatches"]) == (4, 8)
    assert keys["mudd_ffn_reallocation"] == "false"
  written = (tmp_path / "mine.md").read_text().splitlines()
  cells = [line.split(" | ")[-3:] for line in written if line.startswith("| 405m")]
  assert cells[:2] == [["4.0", "-", "50 % |"], ["22.0", "1.000", "9 % |"]]
  _, asked, _ = rows("--models", "2p8b", "--pipeline", "4", "base_num_decoder_layers=8")
  assert {(case[4]["num_layers_per_pipeline_stage"], case[4]["num_pipeline_microbatches"]) for case in asked} == {
    (2, 4)
  }


def test_what_a_row_sets():
  given = {"mudd_ffn_groups": "4", "mudd_activation": "gelu_tanh", "remat_policy": "minimal"}
  assert aot.keys_of(True, False, given) == {"scan_layers": True, "remat_policy": "minimal"}
  assert aot.keys_of(True, True, given) == {"scan_layers": True, "mudd_ffn_parts": 2} | given
  assert aot.keys_of(False, True, given) == {"scan_layers": False} | given
  for off in ("false", "False", "0"):
    given = {"mudd_ffn_reallocation": off}
    assert aot.keys_of(True, True, given) == {"scan_layers": True} | given
    assert aot.keys_of(True, False, given) == {"scan_layers": True}


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    ((), "scanned by mudd_ffn_groups=2, mudd_ffn_parts=2, single by mudd_ffn_groups=0, mudd_ffn_parts=1."),
    (
      ("mudd_ffn_groups=4", "mudd_ffn_parts=1"),
      "scanned by mudd_ffn_groups=4, mudd_ffn_parts=1, single by mudd_ffn_groups=4, mudd_ffn_parts=1.",
    ),
    (("mudd_ffn_reallocation=False",), "No FFN is re-allocated (mudd_ffn_reallocation=false, mudd_ffn_parts=1)."),
  ],
)
def test_the_note_tells_the_widths(rows, overrides, said):
  _, _, printed = rows("--models", "405m", *overrides)
  assert said in printed.out


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (
      ("--models", "3b"),
      "--models has '3b'; use some of 405m, 1p4b, 2p8b, 6p9b, gemma3-12b, deepseek2-16b, llama2-70b.",
    ),
    (
      ("--models", "gemma3-12b", "--pipeline", "2"),
      "--pipeline is for 405m, 1p4b, 2p8b, 6p9b, llama2-70b, and not for gemma3-12b.",
    ),
    (("remat_policy",), "'remat_policy' is not key=value."),
  ],
)
def test_refusals(rows, arguments, sentence):
  status, asked, printed = rows(*arguments)
  assert (status, asked, printed.err) == (2, [], f"{sentence}\n")
