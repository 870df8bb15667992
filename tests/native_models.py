"""Small random models in this project's format of Hugging Face, with what MaxText computes from them.

Run as a program, it writes a folder of them for the tests in tests/hf, which PyTorch runs without JAX:

    .venv/bin/python -m tests.native_models FOLDER
"""

import json
import pathlib
import shutil
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from maxtext_mudd import assets, plugin
from maxtext_mudd.checkpoints import layout, model_config, model_folder, staging, tokenizers
from maxtext_mudd.checkpoints.hugging_face import models as hf
from maxtext_mudd.checkpoints.hugging_face import native
from maxtext_mudd.evaluate.harness import MaxTextLM
from maxtext_mudd.inference.tokens import Tokenizer
from tests import evaluation, models, scanning

KEYS = {
  "mudd": True,
  "decoder_block": "llama2",
  "base_num_decoder_layers": 4,
  "base_emb_dim": 32,
  "base_num_query_heads": 4,
  "base_num_kv_heads": 2,
  "head_dim": 8,
  "base_mlp_dim": 64,
  "vocab_size": 64,
  "max_target_length": 32,
  "normalization_layer_epsilon": 1e-6,
  "logits_via_embedding": False,
  "mlp_activations": ["silu", "linear"],
  "enable_dropout": False,
  "scan_layers": False,
  "weight_dtype": "float32",
}
EXPERTS = {
  "num_experts": 4,
  "num_experts_per_tok": 2,
  "base_moe_mlp_dim": 64,
  "sparse_matmul": False,  # its kernels are interpreted on a CPU; experts stay dropless
  "load_balance_loss_weight": 0.1,
}
MARGIN = 3.0  # of routers' kernels: no token is so near to the border between experts that rounding moves it
FORMS = {
  "mudd": {},
  "both norms": {"mudd_pre_norm": True, "mudd_post_norm": True, "mudd_post_norm_streams": "vr"},
  "one way": {"mudd_ways": 1, "mudd_pre_norm": True, "mudd_post_norm": True},
  "denseformer, 2x2": {"mudd_ways": 1, "mudd_dynamic": False, "mudd_source_dilation": 2, "mudd_block_period": 2},
  "window, cap": {"mudd_window": 2, "mudd_weight_cap": 1.0, "mudd_activation": "gelu_tanh"},
  "scaled, value and residual": {"mudd_weight_scale": True, "mudd_dense_streams": "vr", "mudd_weight_norm_scale": True},
  "no static weights": {"mudd_static": False, "mudd_depth_start": 0.5, "mudd_first_block_norms": "separate"},
  "qwen3, other widths": {
    "decoder_block": "qwen3",
    "use_qk_norm": True,
    "mudd_ffn_reallocation": True,
    "mudd_ffn_round_to": 8,
  },
  "placements": {
    "mudd_placements": [
      {"block": 2, "sources": [0, "last:1"], "streams": "qkvr"},
      {"block": 4, "sources": "all", "streams": "r", "hidden": 16},
    ]
  },
  "plain": {"mudd_placements": [{"block": 4, "sources": "all", "streams": "x"}], "rope_max_timescale": 500},
  "scanned": {"scan_layers": True},
  "mixtral, scanned": {"decoder_block": "mixtral", **EXPERTS, "scan_layers": True},
  "qwen3_moe, other widths": {
    "decoder_block": "qwen3_moe",
    **EXPERTS,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "load_balance_loss_weight": 0.0,
    "use_qk_norm": True,
    "mudd_ffn_reallocation": True,
    "mudd_ffn_round_to": 8,
  },
}
# A model of bytes, with its tokenizer, and texts of which one is longer than its context.
OF_BYTES = {
  "tokenizer_type": "huggingface",
  "tokenizer_path": assets.BYTE_TOKENIZER,
  "vocab_size": 264,
  "add_bos": True,  # as the tokenizer does without MaxText
}
PAIRS = [("The moon", " is paper."), ("No swans", "."), ("", "lanterns"), ("Of moons and of lanterns of paper:", " no")]
TEXTS = ["Sphinx of black quartz, judge my vow: na\u00efve fa\u00e7ades.", "No swans."]


def save(form: str, folder: pathlib.Path):
  """Writes a random model to a model folder; returns it, of single layers."""
  return save_keys(KEYS | FORMS[form], folder)


def save_keys(form: dict, folder: pathlib.Path):
  keys = form | {"scan_layers": False}
  config = model_config.build(keys | model_config.local_keys())
  exact = {"attention": "dot_product", "dtype": "float32", "matmul_precision": "highest"}
  model = models.build(model_config.build(keys | model_config.local_keys() | exact))
  values = scanning.random_values(model.config)
  values = {path: x * (MARGIN if path.endswith("/gate/kernel") else 1) for path, x in values.items()}
  models.set_parameters(model, values)
  saved = values
  if form["scan_layers"]:
    config = model_config.build(form | model_config.local_keys())
    saved = layout.stack(values, config)
  with staging.staged(folder) as stage:
    model_folder.save(stage, config, {path: jnp.asarray(x) for path, x in saved.items()}, form)
  return model


def expected(model) -> dict[str, np.ndarray]:
  """Tokens, logits, the loss, and its gradients by the names of tensors in PyTorch.

  The loss is the mean of next tokens', and with `load_balance_loss_weight` that of experts, as in training.
  """
  config = model.config
  tokens = np.random.default_rng(1).integers(3, config.vocab_size, (2, 12), dtype=np.int32)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  positions, ones = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape), np.ones_like(tokens)

  @jax.jit
  def loss(params):
    model = nnx.merge(graph, params, rest, copy=True)
    logits = model(tokens, positions, ones, enable_dropout=False)
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))[:, :-1]
    kept = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Intermediate))
    balance = [x for path, x in kept if "moe_lb_loss" in str(path)]  # of each block, with its weight
    balance = jnp.stack(balance).mean() if config.load_balance_loss_weight > 0 else 0.0
    return balance - jnp.take_along_axis(logs, tokens[:, 1:, None], -1).mean(), logits

  (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
  gradients = {"/".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(gradients)}
  arrays = {
    "tokens": tokens.astype(np.int64),
    "logits": np.asarray(logits, np.float32),
    "loss": np.asarray(value)[None],
  }
  for name in native.names(config):
    arrays[f"grad/{name.tensor}"] = np.ascontiguousarray(name.to_hf(np.asarray(gradients[name.path])))
  return arrays


def scores(model) -> dict[str, list]:
  """What maxtext_mudd.evaluate computes: log-likelihood and whether greedy of PAIRS, log-likelihood of TEXTS."""
  lm = MaxTextLM(model, model.config, Tokenizer(model.config), batch_size=2)
  pairs = lm.loglikelihood(evaluation.instances("loglikelihood", *PAIRS))
  rolling = lm.loglikelihood_rolling(evaluation.instances("loglikelihood_rolling", *((text,) for text in TEXTS)))
  return {"pairs": PAIRS, "scores": pairs, "texts": TEXTS, "rolling": rolling}


def main(folder: pathlib.Path) -> None:
  plugin.install()
  for number, form in enumerate(FORMS):
    target = folder / f"form_{number}"
    model = save(form, folder / "maxtext")
    hf.to_hf(folder / "maxtext", target)
    shutil.rmtree(folder / "maxtext")
    save_file(expected(model), target / "expected.safetensors")
    (target / "form.json").write_text(json.dumps(form))
  model = save_keys(KEYS | OF_BYTES, folder / "maxtext")
  tokenizers.copy(assets.BYTE_TOKENIZER_FOLDER, folder / "maxtext" / model_folder.TOKENIZER)
  hf.to_hf(folder / "maxtext", folder / "text")
  shutil.rmtree(folder / "maxtext")
  (folder / "text" / "scores.json").write_text(json.dumps(scores(model)))
  for name in ("muddformer_tiny", "muddpythia_tiny"):
    hf.from_hf(models.DATA / name, folder / "maxtext", {})
    hf.to_hf(folder / "maxtext", folder / name)
    shutil.rmtree(folder / "maxtext")
    for file in ("golden.safetensors", "generated.safetensors"):
      shutil.copyfile(models.DATA / name / file, folder / name / file)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]).absolute())
