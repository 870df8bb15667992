"""Run as a program: inspects a random model on a mesh of all devices, and writes the arrays to a file (npz)."""

import json
import sys

import numpy as np

from maxtext_mudd import plugin
from maxtext_mudd.inference import inspection
from tests import models


def main(path: str, overrides: dict) -> None:
  plugin.install()
  cfg = models.config(**overrides)
  model = models.build(cfg)
  models.randomise(model)
  found = inspection.inspect(model, models.batch(cfg)["inputs"], keep=inspection.KINDS)
  np.savez(path, **{name.replace("/", "."): x for name, x in found.items()})


if __name__ == "__main__":
  main(sys.argv[1], json.loads(sys.argv[2]))
