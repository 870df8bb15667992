"""The figures of `maxtext_mudd.analyze`: each against what it is by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from maxtext_mudd.analyze import ablation, figures, measurement
from maxtext_mudd.inference import inspection
from tests import models, scanning
from tests.evaluation import KEYS, build

REQUEST = types.SimpleNamespace(sinks=(".",), to="static", block=None, figure="")
GOLDEN = models.DATA / "muddformer_tiny"


@pytest.fixture(scope="module")
def lm():
  return build(base_num_decoder_layers=3)


def data_of(lm, text="Of moons. And of lanterns of paper.\nNo swans.", length=12):
  rows = measurement.sequences(text, lm.text_tokenizer, lm.config, length, 9)
  return list(measurement.batches(rows, lm.config, length, 2))


def test_batches(lm):
  batches = data_of(lm, "abcdefg", length=4)
  tokens, positions, segments = (np.concatenate(x) for x in zip(*batches))
  a = 3 + ord("a")  # after <pad>, <bos>, <eos>
  np.testing.assert_array_equal(tokens[:3], [[1, a, a + 1, a + 2], [1, a + 3, a + 4, a + 5], [1, a + 6, 0, 0]])
  np.testing.assert_array_equal(segments, [[1] * 4, [1] * 4, [1, 1, 0, 0], [0] * 4])
  np.testing.assert_array_equal(positions, [range(4)] * 4)
  assert [len(x) for x in measurement.sequences("x" * 99, lm.text_tokenizer, lm.config, 4, 5)] == [4] * 5
  assert len(next(measurement.batches([[1, 2]] * 5, lm.config, 4, 8))[0]) == 5


def test_lengths_for_kernels(monkeypatch):
  monkeypatch.setattr(measurement.devices, "batch_parts", lambda config: 2)
  config = types.SimpleNamespace(max_target_length=500)
  shapes = {
    length: next(measurement.batches([[1, 2]] * 3, config, length, 8))[0].shape for length in (128, 129, 400, 500)
  }
  assert shapes == {128: (4, 128), 129: (4, 256), 400: (4, 500), 500: (4, 500)}


def test_first_tokens_are_those_of_the_whole_text():
  """Of a tokenizer that joins letters to words, and of which some words are longer than others."""
  text = " ".join("x" * (1 + k * k % 50) for k in range(400))
  ids = {word: k for k, word in enumerate(sorted(set(text.split())))}
  tokenizer = types.SimpleNamespace(encode=lambda text, bos: [ids.get(x, -1) for x in text.split()], prefix_id=-2)
  config = types.SimpleNamespace(max_target_length=100)
  whole = tokenizer.encode(text, bos=False)
  for length, number in ((11, 3), (3, 1), (100, 50)):
    rows = measurement.sequences(text, tokenizer, config, length, number)
    assert [x for row in rows for x in row[1:]] == whole[: (length - 1) * number]


def golden_arrays():
  """The authors' intermediates under the names of `inspect`, and a batch of their tokens, of which some are padding."""
  golden = load_file(GOLDEN / "golden.safetensors")
  number = sum(name.startswith("hidden.") for name in golden) - 1
  arrays = {f"history/{i:03d}": golden[f"hidden.{i}"] for i in range(number + 1)}
  arrays["streams/x/da_000"] = golden["hidden.0"]
  for i in range(number):
    streams = "qkvr" if i < number - 1 else "r"
    for c, stream in enumerate(streams):
      arrays[f"streams/{stream}/da_{i + 1:03d}"] = golden[f"streams.{i}"][c]
      arrays[f"weights/{stream}/da_{i + 1:03d}"] = golden[f"dw.{i}"][c]
      norms = [np.linalg.norm(golden[f"hidden.{j}"], axis=-1) for j in range(i + 2)]
      arrays[f"norms/{stream}/da_{i + 1:03d}"] = np.stack(norms, -1)
  tokens = golden["input_ids"]
  is_token = np.arange(tokens.shape[1]) < np.array([tokens.shape[1], tokens.shape[1] - 3])[: len(tokens), None]
  batch = (tokens, np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), is_token.astype(np.int32))
  config = models.config(mudd=True, base_num_decoder_layers=number, base_emb_dim=64)
  return golden, arrays, batch, config, is_token


def measured(figure, model, arrays, batch, repeat=1):
  sums = jax.device_get(figure.sums(model, None, {name: jnp.asarray(x) for name, x in arrays.items()}, batch))
  sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
  sums = figure.added(sums)
  return figure.arrays(jax.tree.map(lambda x: repeat * x, sums))


def test_similarity_of_the_golden_model():
  golden, arrays, batch, config, is_token = golden_arrays()
  model = types.SimpleNamespace(config=config)
  found = measured(figures.Similarity(REQUEST, config, None), model, arrays, batch)
  assert found["mean"].labels["stream"] == ["q", "k", "v", "r"]
  for c in range(4):
    for i in range(config.num_decoder_layers - 1):
      x, y = golden[f"streams.{i - 1}"][c] if i else golden["hidden.0"], golden[f"streams.{i}"][c]
      x, y = x.astype(np.float64), y.astype(np.float64)
      cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
      of_tokens = np.sort(cosines[is_token])
      assert found["mean"].values[c, i] == pytest.approx(of_tokens.mean(), abs=2e-6)
      for q in (5, 95):
        expected = of_tokens[int(np.ceil(q / 100 * len(of_tokens))) - 1]
        assert found[f"percentile_{q}"].values[c, i] == pytest.approx(expected, abs=5e-4)


def test_weights_of_the_golden_model():
  golden, arrays, batch, config, is_token = golden_arrays()
  model = types.SimpleNamespace(config=config)
  found = measured(figures.DepthWeights(REQUEST, config, None), model, arrays, batch, repeat=3)
  number = config.num_decoder_layers
  norms = [np.linalg.norm(golden[f"hidden.{j}"], axis=-1)[is_token].mean() for j in range(number + 1)]
  for i in range(1, number + 1):
    streams = "qkvr" if i < number else "r"
    for c, stream in enumerate(streams):
      row = found["mean"].labels["stream"].index(stream)
      of_tokens = golden[f"dw.{i - 1}"][c][is_token].astype(np.float64)  # [tokens, sources]
      for name, expected in (("mean", of_tokens.mean(0)), ("deviation", of_tokens.std(0))):
        values = found[name].values[row, i - 1]
        np.testing.assert_allclose(values[: i + 1], expected * norms[: i + 1], rtol=1e-4, atol=1e-5)
        assert np.isnan(values[i + 1 :]).all()
  assert np.isnan(found["mean"].values[0, -1]).all()  # the last aggregate makes one stream


SOLVED = 1e-3  # relative error of what a test solves for from float32 arrays; 1.5e-4 was seen
FAMILIES = {
  "mhc": {"mudd_expansion_rate": 3},
  "hyper_connections": {"mudd_expansion_rate": 3},
  "attnres": {"mudd_attnres_block": 1},
  "attnres of two heads": {"mudd_attnres_block": 3, "mudd_attnres_heads": 2},
  "dca": {"mudd_dca_sources": "middle_sum", "mudd_dca_k": 1},
  "dca v1": {"mudd_dca_weights": "v1"},
}


def kept_by(name, layers=3):
  config = models.config(mudd=True, depth_connection=name.split()[0], base_num_decoder_layers=layers, **FAMILIES[name])
  model = models.build(config)
  models.randomise(model)
  return config, inspection.inspect(model, models.batch(config)["inputs"])


@pytest.mark.parametrize("name", ["mhc", pytest.param("hyper_connections", marks=pytest.mark.slow)])
def test_weights_along_all_paths(name):
  """Times the outputs of sublayers, which the test computes from residual streams, they sum to what sublayers read."""
  _, arrays = kept_by(name)
  arrays = {key: np.asarray(x, np.float64) for key, x in arrays.items()}
  weights, norms = figures.depth_weights({key: jnp.asarray(x, jnp.float32) for key, x in arrays.items()}, 3)
  sources = [arrays["history/000"][:, :, 0]]
  for i in range(3):
    for sublayer in ("attention", "ffn"):
      found = weights[f"{sublayer}/{i:03d}"]
      assert found.shape[-1] == len(sources)
      read = sum(found[..., j, None] * x for j, x in enumerate(sources))
      streams = arrays[f"streams/{sublayer}/da_{i:03d}"]
      np.testing.assert_allclose(read, streams, rtol=0, atol=SOLVED * np.abs(streams).max())
      expected = np.stack([np.linalg.norm(x, axis=-1) for x in sources], -1)
      np.testing.assert_allclose(norms[f"{sublayer}/{i:03d}"], expected, rtol=SOLVED)
      w, beta = arrays[f"weights/{sublayer}/da_{i:03d}"], arrays[f"written/{sublayer}/da_{i:03d}"]
      if sublayer == "attention":
        between = np.einsum("btij,btjd->btid", w[:, :, 1:], arrays[f"history/{i:03d}"])
        of_ffn = arrays[f"weights/ffn/da_{i:03d}"][:, :, 0]
        excess = arrays[f"streams/ffn/da_{i:03d}"] - np.einsum("btj,btjd->btd", of_ffn, between)
        output = excess / (of_ffn * beta).sum(-1)[..., None]
        between = between + beta[..., None] * output[:, :, None]
      else:
        after = np.einsum("btij,btjd->btid", w[:, :, 1:], between)
        output = ((arrays[f"history/{i + 1:03d}"] - after) / beta[..., None]).mean(2)
      sources.append(output)
  read = sum(weights["x/003"][..., j, None] * x for j, x in enumerate(sources))
  streams = arrays["streams/x/da_003"]
  np.testing.assert_allclose(read, streams, rtol=0, atol=SOLVED * np.abs(streams).max())


@pytest.mark.parametrize("name", [x if x == "dca" else pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES])
def test_weights_of_other_families(name):
  """They have a panel for each stream, and a row for each aggregate; what is not there is NaN."""
  config, arrays = kept_by(name)
  model, tokens = types.SimpleNamespace(config=config), models.batch(config)["inputs"]
  found = measured(
    figures.DepthWeights(REQUEST, config, None), model, arrays, (tokens, None, np.ones(tokens.shape, int))
  )
  mean = found["mean"]
  for row, stream in enumerate(mean.labels["stream"]):
    for column, after in enumerate(mean.labels["aggregate"]):
      key = f"weights/{stream}/da_{after:03d}"
      values = mean.values[row, column]
      assert (key in arrays) == (not np.isnan(values).all())
      if key in arrays and "written/ffn/da_000" not in arrays:
        weights = np.asarray(arrays[key], np.float64)
        weights = (weights.mean(2) if weights.ndim == 4 else weights).mean((0, 1))
        expected = weights * np.asarray(arrays[key.replace("weights", "norms")]).mean((0, 1))
        np.testing.assert_allclose(values[~np.isnan(values)], expected, rtol=1e-4, atol=1e-6)
  if name == "dca":  # DA_3 mixes the embedding, the sum of blocks 1 and 2, and block 3
    assert mean.labels["stream"] == ["x", "q", "k", "v"]
    assert [*np.flatnonzero(~np.isnan(mean.values[0, 3]))] == [0, 2, 3]
    assert figures.DepthWeights.summary(found).startswith("share of the mean weight on older sources")


def test_heads_of_attention_made_by_hand(lm):
  """Two heads, five tokens: the first head looks at itself, the second at the token before."""
  text = ["a", "b", ".", "c"]
  tokens = np.array([[1, *(lm.text_tokenizer.encode(x, bos=False)[0] for x in text)]])
  batch = (tokens, np.arange(5)[None], np.ones((1, 5), int))
  maps = np.stack([np.eye(5), np.eye(5, k=-1)])[None] + 0.1
  figure = figures.Heads(REQUEST, lm.config, lm.text_tokenizer)
  arrays = {"attention/block_001": figure.functions["attention"](jnp.asarray(maps))}
  # Positions 2, 3 and 4: the first head looks at "b", "." and "c", the second at "a" in place 1, "b" and ".".
  assert measured(figure, None, arrays, batch)["active"].values == pytest.approx([3 / 6])
  arrays["attention/block_004"] = arrays["attention/block_001"]  # as of multi-token prediction
  batch[2][0, 4] = 0
  assert measured(figure, None, arrays, batch)["active"].values == pytest.approx([2 / 4])


def test_sinks_are_not_only_the_first_positions(lm):
  """BOS and a newline in the middle of a sequence, and the learned sink of a head."""
  request = types.SimpleNamespace(sinks=None)
  figure = figures.Heads(request, lm.config, lm.text_tokenizer)
  newline = lm.text_tokenizer.encode("\n", bos=False)[0]
  tokens = np.array([[1, 100, 1, newline, 101, 102]])  # BOS, a letter, BOS, newline, letters
  batch = (tokens, np.arange(6)[None], np.ones((1, 6), int))
  looked_at = [0, 0, 2, 3, 4, 5]
  maps = np.eye(6)[None, None, looked_at] * 0.6
  arrays = {"attention/block_001": figure.functions["attention"](jnp.asarray(maps))}
  assert measured(figure, None, arrays, batch)["active"].values == pytest.approx([2 / 4])
  maps[..., 4, 4] = 0.3  # a learned sink has 0.7
  arrays = {"attention/block_001": figure.functions["attention"](jnp.asarray(maps))}
  assert measured(figure, None, arrays, batch)["active"].values == pytest.approx([1 / 4])


def test_sinks_as_they_are_in_a_text():
  """A tokenizer that has another token for a full stop at the start of a text, as those of Llama 2."""
  tokens = {"a": [5], ".": [8], "a.": [5, 7], "\n": [5, 1], "a\n": [5, 3], "x": [], "ax": [5], "ab": [5, 6]}
  tokenizer = types.SimpleNamespace(encode=lambda text, bos: tokens.get(text, [1, 2, 3]))
  assert figures.tokens_of(tokenizer, ".") == {7, 8}
  assert figures.tokens_of(tokenizer, "\n") == {3}
  assert figures.tokens_of(tokenizer, "x") == set()
  assert figures.tokens_of(tokenizer, "yz") == set()


def test_deviations_of_almost_equal_weights():
  """Of weights near one that differ in the sixth digit, in float32, over many tokens."""
  model = types.SimpleNamespace(config=models.config(mudd=True, base_num_decoder_layers=1))
  figure = figures.DepthWeights(REQUEST, model.config, None)
  x = (1 + 1e-6 * np.random.default_rng(0).standard_normal((4, 4096, 2))).astype(np.float32)
  norms = np.full((4, 4096, 2), 32**0.5, np.float32)
  arrays = {"weights/r/da_001": x, "norms/r/da_001": norms}
  batch = (None, None, np.ones((4, 4096), int))
  found = measured(figure, model, arrays, batch)["deviation"].values[0, 0]
  np.testing.assert_allclose(found, x.astype(np.float64).std((0, 1)) * 32**0.5, rtol=0.05)


def loss_of(model, data):
  """The mean cross-entropy of next tokens, in float64."""
  total, count = 0, 0
  for tokens, _, segments in data:
    logits = np.asarray(inspection.inspect(model, tokens, keep=[], segment_ids=segments)["logits"], np.float64)
    peak = logits.max(-1, keepdims=True)
    logs = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    is_next = segments[:, 1:] > 0
    total -= np.take_along_axis(logs[:, :-1], tokens[:, 1:, None], -1)[..., 0][is_next].sum()
    count += is_next.sum()
  return total / count


@pytest.mark.slow
def test_ablation_is_a_model_with_other_weights(lm):
  """A model whose W2 is zero for a source, a stream or an aggregate has its static weights there."""
  data, model = data_of(lm), lm.model
  found = ablation.Ablation(REQUEST, lm.config, None).measure(model, data, lambda: None, "x")
  values = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
  whole = loss_of(model, data)
  assert found["baseline"].values == pytest.approx(whole, rel=1e-6)

  def changed(*paths, at=(...,)):
    other = {path: x.copy() for path, x in values.items()}
    for path in paths:
      other[f"{path}/w2"][(slice(None), *at)] = 0
    models.set_parameters(model, other)
    change = loss_of(model, data) - whole
    models.set_parameters(model, values)
    return pytest.approx(change, abs=2e-6)

  second = "decoder/layers_2/connection/depth_aggregate"
  last = "decoder/layers_2/connection/final_depth_aggregate"
  paths = [path.removesuffix("/w2") for path in values if path.endswith("/w2")]
  assert found["source"].values[1, 0] == changed(second, at=(slice(None), 0))
  assert found["source"].values[2, 3] == changed(last, at=(slice(None), 3))
  assert found["stream"].labels["stream"] == ["q", "k", "v", "r"]
  assert found["stream"].values[1, 2] == changed(second, at=(2,))
  assert np.isnan(found["stream"].values[2]).all()
  assert found["aggregate"].values[1] == changed(second)
  assert found["everything"].values == changed(*paths)
  assert np.abs(found["everything"].values) > 0.01

  request = types.SimpleNamespace(to="zero")
  found = ablation.Ablation(request, lm.config, None).measure(model, data, lambda: None, "x")
  original = dict(values)
  values[f"{second}/a"] = original[f"{second}/a"] * (np.arange(3) != 0)
  change = changed(second, at=(slice(None), 0))
  models.set_parameters(model, original)
  assert found["source"].values[1, 0] == change
  assert np.abs(found["source"].values[1, 0]) > 1e-3


FORMS = {
  "extra embedding, both norms": {"mudd_extra_embeddings": 1, "mudd_pre_norm": True, "mudd_post_norm": True},
  "dilation and period": {"mudd_source_dilation": 2, "mudd_block_period": 2},
  "one way, scale": {"mudd_ways": 1, "mudd_weight_scale": True},
  "value and residual streams of the upper half": {"mudd_dense_streams": "vr", "mudd_depth_start": 0.5},
  "connected MTP": {"mtp_num_layers": 1, "mudd_mtp": "connected"},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_ablation_of_other_forms(form):
  """Each source, stream and aggregate of a model of four blocks is that with rows of W2 set to zero."""
  lm = build(base_num_decoder_layers=4, **FORMS[form])
  data, model = data_of(lm), lm.model
  figure = ablation.Ablation(REQUEST, lm.config, None)
  found = figure.measure(model, data, lambda: None, "x")
  values = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
  whole, number = loss_of(model, data), 0
  for row, site in enumerate(figure.sites):
    name = "layers_3/connection/final_" if site.block == 4 else f"layers_{site.block}/connection/"
    path = f"decoder/{name}depth_aggregate/w2"
    cases = [(found["aggregate"].values[row], ...)]
    for k, source in enumerate(site.sources):
      column = found["source"].labels["source"].index(source)
      cases.append((found["source"].values[row, column], (..., k)))
    for c, stream in enumerate(site.streams if site.ways > 1 else ""):
      column = found["stream"].labels["stream"].index(stream)
      cases.append((found["stream"].values[row, column], (slice(None), c)))
    for increase, at in cases:
      w2 = values[path].copy()
      w2[at] = 0
      models.set_parameters(model, values | {path: w2})
      assert increase == pytest.approx(loss_of(model, data) - whole, abs=2e-6)
      number += 1
  filled = sum(np.isfinite(found[name].values).sum() for name in ("source", "stream", "aggregate"))
  assert number == filled


@pytest.mark.slow
def test_figures_of_bfloat16(lm):
  """Of the same parameters: cosines, weights and losses near those in float32."""
  data, of_dtypes = data_of(lm), []
  for dtype in ("float32", "bfloat16"):
    config = models.config(**KEYS | {"base_num_decoder_layers": 3, "dtype": dtype})
    of_dtypes.append(models.build(config))
    models.set_parameters(of_dtypes[-1], scanning.random_values(config))
  for name, key in (("similarity", "mean"), ("weights", "mean"), ("lens", "loss")):
    kind = figures.FIGURES[name]
    arrays = (kind(REQUEST, x.config, None).measure(x, data, lambda: None, name)[key].values for x in of_dtypes)
    wide, narrow = arrays
    assert not np.array_equal(np.nan_to_num(narrow), np.nan_to_num(wide))
    np.testing.assert_allclose(narrow, wide, atol=0.02 * np.nanmax(np.abs(wide)), rtol=0)


@pytest.mark.slow
def test_ablation_to_the_mean(lm):
  """A weight that is its mean in a model without other dynamic weights."""
  data, model = data_of(lm), lm.model
  request = types.SimpleNamespace(to="mean")
  found = ablation.Ablation(request, lm.config, None).measure(model, data, lambda: None, "x")
  weights, is_token = [], []
  for tokens, _, segments in data:
    weights.append(inspection.inspect(model, tokens, segment_ids=segments)["weights/r/da_003"])
    is_token.append(segments > 0)
  mean = np.concatenate(weights)[np.concatenate(is_token)].mean(0)
  values = {path: np.asarray(x.get_value()) for path, x in models.parameters(model).items()}
  last = "decoder/layers_2/connection/final_depth_aggregate"
  whole = loss_of(model, data)
  models.set_parameters(model, values | {f"{last}/w2": 0 * values[f"{last}/w2"], f"{last}/a": mean[None]})
  change = loss_of(model, data) - whole
  models.set_parameters(model, values)
  assert found["aggregate"].values[2] == pytest.approx(change, abs=2e-6)


@pytest.mark.slow
def test_the_lens_ends_in_the_loss(lm):
  data = data_of(lm)
  figure = figures.Lens(REQUEST, lm.config, None)
  found = figure.measure(lm.model, data, lambda: None, "x")["loss"].values
  assert found.shape == (4, 4)
  total, count = 0, 0
  for tokens, _, segments in data:  # the head on the value stream of block 2
    arrays = inspection.inspect(lm.model, tokens, segment_ids=segments)
    stream = np.asarray(arrays["streams/v/da_001"], np.float64)
    values = {path: np.asarray(x.get_value(), np.float64) for path, x in models.parameters(lm.model).items()}
    normed = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + lm.config.normalization_layer_epsilon)
    logits = normed * values["decoder/decoder_norm/scale"] @ values["decoder/logits_dense/kernel"]
    logs = logits - logits.max(-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    is_next = segments[:, 1:] > 0
    total -= np.take_along_axis(logs[:, :-1], tokens[:, 1:, None], -1)[..., 0][is_next].sum()
    count += is_next.sum()
  assert found[2, 1] == pytest.approx(total / count, rel=1e-6)
  np.testing.assert_allclose(found[:, 3], loss_of(lm.model, data), rtol=1e-6)
  assert (found[:, 0] == found[0, 0]).all()  # all streams of block 1 are the embedding
