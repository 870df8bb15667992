"""Run as a program: inspects a random model on a mesh of all devices, and measures its figures; writes a file (npz)."""

import json
import sys
import types

import numpy as np

from maxtext_mudd import plugin
from maxtext_mudd.analyze import ablation, figures
from maxtext_mudd.inference import inspection
from tests import models, scanning

TOKENIZER = types.SimpleNamespace(bos_id=0, encode=lambda text, bos: [ord(text[-1])], decode=lambda ids: str(ids[0]))
REQUEST = types.SimpleNamespace(sinks=("*", "+", ","), to="static", block=None)


def main(path: str, overrides: dict) -> None:
  plugin.install()
  cfg = models.config(**overrides)
  model = models.build(cfg)
  values = scanning.random_values(cfg)
  if cfg.scan_layers:  # padding is zero
    entries = scanning.entries_of_blocks(cfg, models.parameters(model))
    values = {path: np.where(entries[path], x, 0) for path, x in values.items()}
  models.set_parameters(model, values)
  batch = models.batch(cfg)
  arrays = inspection.inspect(model, batch["inputs"], keep=inspection.KINDS)
  data = [(batch["inputs"], batch["inputs_position"], batch["inputs_segmentation"])]
  model = inspection.inspectable(model)
  kinds = {**figures.FIGURES, "ablate": ablation.Ablation}
  for name in kinds if cfg.depth_connection == "dense" else ("similarity", "weights"):
    of_figure = kinds[name](REQUEST, model.config, TOKENIZER).measure(model, data, lambda: None, name)
    arrays |= {f"{name}/{key}": array.values for key, array in of_figure.items()}
  np.savez(path, **{name.replace("/", "."): x for name, x in arrays.items()})


if __name__ == "__main__":
  main(sys.argv[1], json.loads(sys.argv[2]))
