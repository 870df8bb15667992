"""One of the processes of a tensor-parallel model: exits with an error where its logits or gradients are not MaxText's.

torchrun --nproc-per-node 2 -m tests.hf.tensor_parallel FOLDER
"""

import pathlib
import sys

from safetensors.torch import load_file
import torch
from transformers import AutoModelForCausalLM

TOLERANCE = 2e-5  # of the largest entry, as on one device


def main(folder: pathlib.Path) -> None:
  arrays = load_file(folder / "expected.safetensors")
  options = {"trust_remote_code": True, "dtype": torch.float32, "tp_plan": "auto"}
  model = AutoModelForCausalLM.from_pretrained(folder, **options)
  assert model.model.layers[0].self_attn.q_proj.weight.placements[0].is_shard(0)
  has_balance_loss = model.config.router_aux_loss_coef > 0
  output = model(arrays["tokens"], labels=arrays["tokens"], output_router_logits=has_balance_loss)
  assert (output.logits - arrays["logits"]).abs().max() < TOLERANCE * arrays["logits"].abs().max()
  output.loss.backward()
  gradients = {name: getattr(x.grad, "full_tensor", lambda x=x: x.grad)() for name, x in model.named_parameters()}
  largest = max(x.abs().max() for x in gradients.values())
  for name, x in gradients.items():
    assert (x - arrays[f"grad/{name}"]).abs().max() < TOLERANCE * largest, name


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
