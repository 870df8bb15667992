"""What people use models with: pipeline, Trainer, PEFT and lm-evaluation-harness."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig, Trainer, TrainingArguments, pipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.hf.conftest import EXPERTS, FORMS, MODELS, has_version, load

TEXT = "Of moons and of lanterns of paper. No swans. "


@pytest.fixture(scope="module")
def folder():
  return FORMS["mudd"]


def rows(model, count=8, length=16):
  """Texts with a pattern that can be learnt: each token is the last one plus one."""
  first = torch.arange(count)[:, None] * 3
  tokens = (first + torch.arange(length)) % (model.config.vocab_size - 3) + 3
  return [{"input_ids": x, "labels": x} for x in tokens]


def test_pipeline():
  folder = MODELS / "text"
  generate = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
  found = generate(TEXT, max_new_tokens=5, do_sample=False, return_full_text=False)
  tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
  assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
  tokens = tokenizer(TEXT, return_tensors="pt")
  expected = model.generate(**tokens, max_new_tokens=5, do_sample=False)[0, tokens["input_ids"].shape[1] :]
  assert found == [{"generated_text": tokenizer.decode(expected, skip_special_tokens=True)}]
  both = generate([TEXT, TEXT[:9]], max_new_tokens=5, do_sample=False, return_full_text=False, batch_size=2)
  assert both[0] == found


@pytest.mark.parametrize("form", ["mudd", EXPERTS[0]])
def test_trainer(form, tmp_path):
  losses = {}
  for is_checkpointing in (False, True):
    model = load(FORMS[form], output_router_logits=form in EXPERTS).train()
    options = {"learning_rate": 3e-3, "max_steps": 20, "logging_steps": 1, "gradient_checkpointing": is_checkpointing}
    arguments = TrainingArguments(
      tmp_path, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no", **options
    )
    trainer = Trainer(model, arguments, train_dataset=rows(model))
    trainer.train()
    losses[is_checkpointing] = [x["loss"] for x in trainer.state.log_history if "loss" in x]
  assert len(losses[False]) == 20 and losses[False][-1] < losses[False][0] - 1  # nats; 1.6 were seen
  assert losses[True] == pytest.approx(losses[False], abs=1e-3)


# The form of the model, what gets adapters, and names of the modules that have them then.
TARGETS = {
  "attention": ("mudd", ["q_proj", "k_proj", "v_proj"], ["_proj"]),
  "aggregates": ("mudd", r".*\.aggregates\.\d+\.w[12]", [".w1.", ".w2."]),
  "experts": (EXPERTS[0], ["gate_proj", "up_proj", "down_proj"], [f".experts.{i}." for i in range(4)]),
}


@pytest.mark.parametrize("targets", TARGETS)
def test_lora(tmp_path, targets):
  """Only adapters learn; merged, and loaded again, they compute the same."""
  from peft import LoraConfig, PeftModel, get_peft_model

  form, targets, names = TARGETS[targets]
  folder = FORMS[form]
  base = load(folder)
  before = {name: x.clone() for name, x in base.state_dict().items()}
  model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
  learnt = {name for name, x in model.named_parameters() if x.requires_grad}
  assert learnt and all("lora" in name and any(x in name for x in names) for name in learnt)
  optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
  batch = torch.stack([row["input_ids"] for row in rows(base)])
  losses = []
  for _ in range(20):
    loss = model(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
  assert losses[-1] < losses[0] - 0.2  # nats; 0.4 were seen with the least, of aggregates
  with torch.no_grad():
    expected = model.eval()(batch).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert torch.equal(again(batch).logits, expected)
    merged = again.merge_and_unload()
    assert (merged(batch).logits - expected).abs().max() < 1e-4 * expected.abs().max()
  for name, x in load(folder).state_dict().items():
    assert torch.equal(x, before[name])


def test_harness():
  """lm-evaluation-harness gives the log-likelihoods that maxtext_mudd.evaluate gives."""
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

  folder = MODELS / "text"
  expected = json.loads((folder / "scores.json").read_text())
  options = {"pretrained": str(folder), "trust_remote_code": True, "device": "cpu", "dtype": "float32", "batch_size": 2}
  model = HFLM(**options)
  requests = [Instance("loglikelihood", {}, tuple(pair), 0) for pair in expected["pairs"]]
  for (score, is_greedy), (expected_score, expected_greedy) in zip(model.loglikelihood(requests), expected["scores"]):
    assert score == pytest.approx(expected_score, abs=1e-4) and is_greedy == expected_greedy
  # With it, the harness counts the BOS of the tokenizer as a token of the text.
  model = HFLM(**options, add_bos_token=False)
  rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in expected["texts"]]
  assert model.loglikelihood_rolling(rolling) == pytest.approx(expected["rolling"], abs=1e-3)


def test_projections_have_inputs_of_their_own(folder):
  """Where three projections share an input, vLLM joins them into one matrix, which would be wrong here."""
  model, inputs = load(folder), {}
  for c in "qkv":
    module = getattr(model.model.layers[1].self_attn, f"{c}_proj")
    module.register_forward_hook(lambda _, given, output, c=c: inputs.update({c: given[0]}))
  with torch.no_grad():
    model(torch.arange(3, 11)[None])
  for first, second in ("qk", "kv", "vq"):
    assert (inputs[first] - inputs[second]).abs().max() > 0.1


@pytest.mark.skipif(not has_version("5"), reason="the attention of transformers 4 breaks graphs")
def test_no_graph_breaks(folder):
  arrays = load_file(folder / "expected.safetensors")
  model = load(folder)
  compiled = torch.compile(model, fullgraph=True, backend="eager")
  with torch.no_grad():
    logits = compiled(arrays["tokens"], use_cache=False).logits
  assert (logits - arrays["logits"]).abs().max() < 2e-5 * arrays["logits"].abs().max()


@pytest.mark.skipif(not has_version("5.24"), reason="earlier versions have another form of tensor parallelism")
@pytest.mark.parametrize("form", ["mudd", "qwen3, other widths", EXPERTS[0]])
def test_tensor_parallel(form):
  """Two processes; aggregates are whole on each."""
  command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.hf.tensor_parallel"]
  subprocess.run([*command, FORMS[form]], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_an_attention_of_another_backend(folder):
  """Backends such as vLLM's are registered under a name, and get the scale and further keyword arguments."""
  calls = []

  def attend(module, query, key, value, mask, scaling, backend_argument=None, **kwargs):
    calls.append((module.layer_idx, scaling == module.scaling, backend_argument))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling, **kwargs)

  ALL_ATTENTION_FUNCTIONS.register("of_the_test", attend)
  model, tokens = load(folder), torch.arange(3, 11)[None]
  with torch.no_grad():
    expected = model(tokens, use_cache=False).logits
    model.config._attn_implementation = "of_the_test"
    found = model(tokens, use_cache=False, backend_argument=7).logits
  assert calls == [(i, True, 7) for i in range(4)]
  assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


class ThreeArguments(transformers.DynamicCache):
  """A cache whose `update` takes what transformers' documentation states."""

  def update(self, key_states, value_states, layer_idx, cache_kwargs=None):
    return super().update(key_states, value_states, layer_idx)


def test_caches_of_others(folder):
  model, tokens = load(folder), torch.arange(3, 11)[None]
  with torch.no_grad():
    whole = model(tokens).logits
    cache = ThreeArguments()
    model(tokens[:, :5], past_key_values=cache)
    assert (model(tokens[:, 5:], past_key_values=cache).logits - whole[:, 5:]).abs().max() < 2e-5 * whole.abs().max()
  with pytest.raises(ValueError, match="A cache of tuple needs position_ids"):
    model(tokens, past_key_values=((tokens, tokens),))


@pytest.mark.skipif(not has_version("5.24"), reason="earlier versions have another paged cache")
def test_continuous_batching():
  folder = MODELS / "text"
  tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder, attn_implementation="paged|sdpa")
  prompts = [tokenizer(text)["input_ids"] for text in (TEXT[:9], TEXT[:15], TEXT[:4])]
  options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
  small = transformers.ContinuousBatchingConfig(page_size=8, num_blocks=16, max_batch_tokens=64)
  found = model.generate_batch(prompts, options, small, warmup=False)
  plain = load(folder)
  for prompt, output in zip(prompts, found.values(), strict=True):
    tokens = torch.tensor([prompt])
    expected = plain.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=options)
    assert output.generated_tokens == expected[0, len(prompt) :].tolist()
