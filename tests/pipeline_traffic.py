"""Run as a program on virtual CPU devices: compiles models on a pipeline.

Prints a line of JSON for each model: the collective-permutes of the compiled program, as `pipeline_on_mesh.permutes`
finds them, and the shapes of float32 arrays with an entry for each turn of the pipeline.
"""

import json
import re
import sys

from maxtext_mudd.checkpoints import layout
from tests import models, pipeline_on_mesh, scanning


def main(cases: list[dict], pipeline: dict) -> None:
  for keys in cases:
    cfg = models.config(**keys | pipeline)
    values = layout.stack(scanning.random_values(models.config(**keys)), cfg)
    *_, text = pipeline_on_mesh.loss_and_gradients(cfg, values)
    turns = cfg.num_pipeline_microbatches + cfg.ici_pipeline_parallelism - 1
    shapes = {tuple(map(int, x.split(","))) for x in re.findall(rf"f32\[({turns},[\d,]+)\]", text)}
    print(json.dumps({"permutes": pipeline_on_mesh.permutes(text), "of_turns": sorted(shapes)}), flush=True)


if __name__ == "__main__":
  from maxtext_mudd import plugin

  plugin.install()

  main(*map(json.loads, sys.argv[1:]))
