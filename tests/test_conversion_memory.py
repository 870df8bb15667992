"""Memory that conversions take."""

import json
import pathlib
import subprocess
import sys

from flax import traverse_util
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxtext_mudd.blocks import ffn_widths
from maxtext_mudd.checkpoints import model_config, tensors
from maxtext_mudd.checkpoints.authors_jax import config_json as fork_config
from maxtext_mudd.checkpoints.authors_jax import models as fork
from maxtext_mudd.checkpoints.hugging_face import config_json as hf_config
from maxtext_mudd.checkpoints.hugging_face import files as hf_files
from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.checkpoints.hugging_face import names as hf_names
from tests import models, runs
from tests.published import fork_folder

MEASURE = """
import pathlib, sys, threading, time
from maxtext_mudd import plugin
plugin.install()
from maxtext_mudd.checkpoints import model_config, model_folder, tensors
from maxtext_mudd.checkpoints.authors_jax import models as fork
from maxtext_mudd.checkpoints.hugging_face import models as hf

tensors.SHARD_BYTES = int(sys.argv[4])

def resident():  # without pages of files, such as libraries and mapped shards, which the system can drop
  lines = open("/proc/self/status").read().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

def watch():
  global most
  while True:
    most = max(most, resident())
    time.sleep(0.005)

source, target = map(pathlib.Path, sys.argv[2:4])
kind = {"from-hf": hf, "from-fork": fork}.get(sys.argv[1])
keys = kind.Model(source).keys | {"scan_layers": False} if kind else model_folder.read_keys(source)
model_config.parameter_shapes(model_config.build(keys | model_config.local_keys()))  # tracing is not measured
before = most = resident()
threading.Thread(target=watch, daemon=True).start()
if kind:
  model = kind.Model(source)
  model_folder.convert(model, target, {"scan_layers": True}, {})
else:
  hf.to_hf(source, target, released=True)
print(most - before)
"""


def most_memory(*command: str | pathlib.Path, shard: int = tensors.SHARD_BYTES) -> int:
  """Of a conversion, in bytes; `shard`: size of those that it writes."""
  command = [sys.executable, "-c", MEASURE, *map(str, command), str(shard)]
  finished = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, check=True)
  return int(finished.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_of_the_fork_s_orbax_folders(tmp_path):
  """Of a train state with parameters of 0.9 GB: these once, no moments, and what is in flight."""
  golden = models.DATA / "muddjax_plain"
  sizes = {"emb_dim": 1536, "num_query_heads": 12, "num_kv_heads": 12, "head_dim": 128, "mlp_dim": 4096}
  source = fork_folder(tmp_path / "run", **sizes, vocab_size=16384)
  shapes = {name: x.shape for name, x in tensors.of_file(golden / fork.FILE).items()}
  keys = fork_config.keys(shapes, json.loads((source / "config.json").read_text()), source)
  wanted = model_config.parameter_shapes(model_config.build(keys | model_config.local_keys() | {"scan_layers": False}))
  random = np.random.default_rng(0)
  values = {
    tuple(name.split("/")): random.standard_normal(wanted[fork.path_of(name, 5)].shape, np.float32) for name in shapes
  }
  size = sum(x.nbytes for x in values.values())
  assert size > 8 * 10**8
  tree = {"params": traverse_util.unflatten_dict(values)}
  ocp.PyTreeCheckpointer().save(source / "items", {"params": tree, "opt_state": {"mu": tree}})
  assert most_memory("from-fork", source, tmp_path / "m") <= size + 6 * 10**8


@pytest.mark.slow
def test_memory(tmp_path, monkeypatch):
  """Of 1.1 GB: the model once and one shard of two in; out, a shard of many, and what is in flight."""
  source = tmp_path / "hf"
  source.mkdir()
  sizes = {"n_layer": 8, "dim": 1536, "n_head": 12, "n_local_heads": 12, "head_dim": 128, "intermediate_size": 4096}
  fields = json.loads((models.DATA / "muddformer_tiny" / "config.json").read_text()) | sizes | {"vocab_size": 16384}
  widths = ffn_widths.reallocated(4096, 8, **ffn_widths.RELEASED)
  config = model_config.build(hf_config.keys(fields, widths, "") | model_config.local_keys() | {"scan_layers": False})
  random = np.random.default_rng(0)

  def values(shape):
    return lambda: random.standard_normal(shape, dtype=np.float32)

  made = {x.tensor: tensors.Output(x.tensor_shape, np.float32, values(x.tensor_shape)) for x in hf_names.names(config)}
  monkeypatch.setattr(tensors, "SHARD_BYTES", 6 * 10**8)
  tensors.write(source, made)
  (source / "config.json").write_text(json.dumps(fields))
  size = hf.Model(source).size
  assert size > 10**9
  assert most_memory("from-hf", source, tmp_path / "m") <= size + 6 * 10**8
  shard = 10**8
  # Of the largest array, and so of a shard, there are some copies on the way from Orbax to the file.
  assert most_memory("to-hf", tmp_path / "m", tmp_path / "b", shard=shard) <= 7 * shard
  assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 10
  found, expected = (hf_files.open_folder(x) for x in (tmp_path / "b", source))
  assert found.keys() == expected.keys()
  assert all(np.array_equal(found[name].read(), x.read()) for name, x in expected.items())
