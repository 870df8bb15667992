"""Models of experts: against transformers' own, in generation, with padding, and in training."""

import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from tests.hf.conftest import EXPERTS, FORMS, load

TOLERANCE = 1e-5  # of the largest entry, float32 of two libraries; 2e-6 was seen


def close(found, expected, tolerance=TOLERANCE):
  assert found.shape == expected.shape
  assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module", params=EXPERTS)
def form(request):
  return request.param


@pytest.fixture
def model(form):
  return load(FORMS[form])


@pytest.fixture(scope="module")
def tokens(form):
  return load_file(FORMS[form] / "expected.safetensors")["tokens"]


def border(scores, num_chosen):
  """The least distance between the scores of the last chosen expert and the next one."""
  best = scores.sort(-1, descending=True).values
  return (best[..., num_chosen - 1] - best[..., num_chosen]).min()


def test_no_token_is_near_the_border_between_experts(model, tokens):
  """Rounding, of up to 1e-5, sends none to another expert: what tests of these models compare is the same function."""
  with torch.no_grad():
    scores = model(tokens, output_router_logits=True).router_logits
  assert len(scores) == model.config.num_hidden_layers
  for x in scores:
    assert x.shape == (*tokens.shape, model.config.num_experts)
    assert border(x, model.config.num_experts_per_tok) > 1e-3


def test_plain_models_are_qwen3_moe(tmp_path):
  """Without aggregates, transformers' own model loads the weights by the same names, and computes the same."""
  own = load(FORMS[EXPERTS[0]])
  sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
  sizes |= {"num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 48}
  torch.manual_seed(0)
  model = type(own)(type(own.config)(**sizes, use_qk_norm=True, aggregates=[])).eval()
  for name, x in model.named_parameters():
    torch.nn.init.normal_(x, mean=float("norm" in name), std=0.3)
  model.save_pretrained(tmp_path)
  names = {x for x in load_file(tmp_path / "model.safetensors") if x.startswith("model.layers.1.mlp.")}
  kernels = {f"experts.{i}.{name}_proj" for i in range(6) for name in ("gate", "up", "down")}
  assert names == {f"model.layers.1.mlp.{name}.weight" for name in kernels | {"gate"}}
  Qwen3MoeConfig(**sizes, moe_intermediate_size=48, norm_topk_prob=True).save_pretrained(tmp_path)
  theirs, info = Qwen3MoeForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
  rows = torch.randint(64, (2, 12))
  with torch.no_grad():
    output = model(rows, output_router_logits=True)
    assert min(border(x, 3) for x in output.router_logits) > 1e-3
    close(output.logits, theirs.eval()(rows).logits)


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_generation(model, tokens, cache):
  """Greedy tokens are those of one pass over all of them."""
  options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
  options |= {"use_cache": False} if cache is None else {"cache_implementation": cache}
  prompt = tokens[:, :6]
  found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
  with torch.no_grad():
    logits = model(found[:, :-1]).logits
  assert torch.equal(found[:, 6:], logits[:, 5:].argmax(-1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(model, tokens, side):
  short, whole, padding = tokens[0, :7], tokens[1], torch.full((5,), 3)
  row = torch.cat([padding, short] if side == "left" else [short, padding])
  place = slice(5, None) if side == "left" else slice(7)
  mask = torch.ones(2, 12, dtype=torch.long)
  mask[0] = 0
  mask[0, place] = 1
  with torch.no_grad():
    both = model(torch.stack([row, whole]), attention_mask=mask, output_router_logits=True)
    one = model(short[None], output_router_logits=True)
    close(both.logits[0, place], one.logits[0])
    other = model(whole[None], output_router_logits=True)
    close(both.logits[1], other.logits[0])
  close(both.aux_loss, (one.aux_loss + other.aux_loss) / 2)  # padding does not count


def test_balance_loss(model, tokens):
  """Of one sequence and one block, transformers' own loss is as many times as large as a token has experts."""
  config = model.config
  with torch.no_grad():
    rows = [model(row[None], output_router_logits=True) for row in tokens]
    both = model(tokens, output_router_logits=True)
    blocks = [scores for row in rows for scores in row.router_logits]
    sizes = config.num_experts, config.num_experts_per_tok
    losses = [load_balancing_loss_func((scores[0],), *sizes) / config.num_experts_per_tok for scores in blocks]
  assert min(losses) > 1.01  # they are not alike, or the loss would be 1
  close(both.aux_loss, torch.stack(losses).mean())
  assert model(tokens).aux_loss is None


def test_only_experts_with_tokens_are_visited(model, tokens):
  """In training the others get gradients of zero."""
  visits, one = [], tokens[:1, :1]
  for layer in model.model.layers:
    for expert in layer.mlp.experts:
      expert.register_forward_hook(lambda module, given, output: visits.append(module))
  model(one)
  assert len(visits) == len(set(visits)) == 4 * model.config.num_experts_per_tok
  visited = set(visits)
  model.train()
  model(one).logits.square().sum().backward()
  for layer in model.model.layers:
    for expert in layer.mlp.experts:
      assert all((x.grad != 0).any() == (expert in visited) for x in expert.parameters())


def test_routers_of_bfloat16(form, tokens):
  """Scores and weights are in float32."""
  model = load(FORMS[form], torch_dtype=torch.bfloat16)
  router = model.model.layers[0].mlp.gate
  x = torch.randn(3, model.config.hidden_size, dtype=torch.bfloat16)
  with torch.no_grad():
    scores, weights, chosen = router(x)
    output = model(tokens)
  close(scores, x.float() @ router.weight.float().T)
  close(weights.sum(-1), torch.ones(3))
  assert chosen.shape == (3, model.config.num_experts_per_tok)
  assert output.logits.dtype == torch.bfloat16 and torch.isfinite(output.logits).all()


def test_missing_experts_are_initialised(form, model, tmp_path):
  """On the meta device meanwhile."""
  model.save_pretrained(tmp_path)
  tensors = load_file(tmp_path / "model.safetensors")
  missing = {f"model.layers.1.mlp.{name}.weight" for name in ("gate", "experts.2.up_proj", "experts.0.down_proj")}
  kept = {name: x for name, x in tensors.items() if name not in missing}
  save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
  again = load(tmp_path, low_cpu_mem_usage=True).state_dict()
  for name, x in tensors.items():
    if name in missing:
      assert again[name].std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
    else:
      assert torch.equal(again[name], x), name


def test_pythia_has_no_experts(model):
  with pytest.raises(ValueError, match="num_experts=4 does not work with block=pythia; use "):
    type(model.config)(block="pythia", num_experts=4)
