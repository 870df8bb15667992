"""What people use models with: pipeline, Trainer, PEFT and lm-evaluation-harness."""

import ast
import inspect
import json
import os
import subprocess
import sys
import textwrap

import pytest
from safetensors.torch import load_file
import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig, Trainer, TrainingArguments, pipeline

from tests.hf.conftest import FORMS, MODELS, load

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


def test_trainer(folder, tmp_path):
  losses = {}
  for is_checkpointing in (False, True):
    model = load(folder).train()
    options = {"learning_rate": 3e-3, "max_steps": 20, "logging_steps": 1, "gradient_checkpointing": is_checkpointing}
    arguments = TrainingArguments(
      tmp_path, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no", **options
    )
    trainer = Trainer(model, arguments, train_dataset=rows(model))
    trainer.train()
    losses[is_checkpointing] = [x["loss"] for x in trainer.state.log_history if "loss" in x]
  assert len(losses[False]) == 20 and losses[False][-1] < losses[False][0] - 1  # nats; 1.6 were seen
  assert losses[True] == pytest.approx(losses[False], abs=1e-3)


TARGETS = {
  "attention": ["q_proj", "k_proj", "v_proj"],
  "aggregates": r".*\.aggregates\.\d+\.w[12]",
}


@pytest.mark.parametrize("targets", TARGETS)
def test_lora(folder, tmp_path, targets):
  """Only adapters learn; merged, and loaded again, they compute the same."""
  from peft import LoraConfig, PeftModel, get_peft_model

  base = load(folder)
  before = {name: x.clone() for name, x in base.state_dict().items()}
  model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS[targets], task_type="CAUSAL_LM"))
  learnt = {name for name, x in model.named_parameters() if x.requires_grad}
  names = ("_proj",) if targets == "attention" else (".w1.", ".w2.")
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
  model = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=2)
  requests = [Instance("loglikelihood", {}, tuple(pair), 0) for pair in expected["pairs"]]
  for (score, is_greedy), (expected_score, expected_greedy) in zip(model.loglikelihood(requests), expected["scores"]):
    assert score == pytest.approx(expected_score, abs=1e-4) and is_greedy == expected_greedy
  model.add_bos_token = False  # else it counts the BOS of the tokenizer as a token of the text
  rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in expected["texts"]]
  assert model.loglikelihood_rolling(rolling) == pytest.approx(expected["rolling"], abs=1e-3)


def test_projections_have_inputs_of_their_own(folder):
  """A projection that joined q, k and v, as vLLM makes of three that share an input, would be wrong."""
  attention, inputs = load(folder).model.layers[1].self_attn, {}
  for c in "qkv":
    module = getattr(attention, f"{c}_proj")
    module.register_forward_hook(lambda _, given, output, c=c: inputs.update({c: given[0]}))
  streams = torch.randn(3, 1, 4, attention.q_proj.in_features)
  attention(*streams, (torch.ones(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)))
  assert all(torch.equal(inputs[c], x) for c, x in zip("qkv", streams))


@pytest.mark.skipif(transformers.__version__ < "5", reason="the attention of transformers 4 breaks graphs")
def test_no_graph_breaks(folder):
  arrays = load_file(folder / "expected.safetensors")
  model = load(folder)
  compiled = torch.compile(model, fullgraph=True, backend="eager")
  with torch.no_grad():
    logits = compiled(arrays["tokens"], use_cache=False).logits
  assert (logits - arrays["logits"]).abs().max() < 2e-5 * arrays["logits"].abs().max()


@pytest.mark.skipif(
  transformers.__version__ < "5.24", reason="earlier versions have another form of tensor parallelism"
)
@pytest.mark.parametrize("form", ["mudd", "qwen3, other widths"])
def test_tensor_parallel(form):
  """Two processes; aggregates are whole on each."""
  command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.hf.tensor_parallel"]
  subprocess.run([*command, FORMS[form]], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_vllm_finds_the_attention(folder):
  """vLLM reads the source of attention: one variable is looked up in ALL_ATTENTION_FUNCTIONS, and called once, with a
  scale that is an attribute."""
  source = textwrap.dedent(inspect.getsource(type(load(folder).model.layers[0].self_attn).forward))
  nodes = list(ast.walk(ast.parse(source)))
  names = {
    x.targets[0].id
    for x in nodes
    if isinstance(x, ast.Assign) and ast.unparse(x.value).startswith("ALL_ATTENTION_FUNCTIONS[")
  }
  calls = [x for x in nodes if isinstance(x, ast.Call) and getattr(x.func, "id", "") in names]
  assert [ast.unparse(x.value) for x in calls[0].keywords if x.arg == "scaling"] == ["self.scaling"]
  assert len(names) == len(calls) == 1


@pytest.mark.skipif(transformers.__version__ < "5.24", reason="earlier versions have another paged cache")
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
