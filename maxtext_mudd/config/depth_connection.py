"""The keys that turn depth connections on and choose a family, and the settings that work with no family."""

from collections.abc import Iterator

from pydantic import field_validator

from maxtext_mudd import blocks, connections
from maxtext_mudd.blocks import stacks
from maxtext_mudd.connections.keys import KeyGroup, Refusal, key

_WITH_DELTA_NETS = ("qwen3_next", "qwen3_5")
_WITH_HYPER_STREAMS = ("deepseek", "deepseek4")
# Of Qwix: values of `quantization` that add variables to layers, and those without Qwix that compute the same.
_ADDING_VARIABLES = {"fp8_gpu": "fp8", "fp8_nanoo": "nanoo_fp8"}
# The names with which MaxText builds these blocks, and what it does by the name.
_NAMES = {
  "gemma3": (("gemma3-4b", "gemma3-12b", "gemma3-27b"), "scales queries"),
  "deepseek4": (("deepseek4-tiny", "deepseek4-284b"), "chooses experts"),
}


class DepthConnectionKeys(KeyGroup):
  """The keys that choose a family."""

  mudd: bool = key(False, "Whether the model has depth connections; without them it is stock MaxText.")
  depth_connection: str = key(
    connections.DEFAULT, "Family of depth connections; residual: the plain model.", needs={"mudd": (True,)}
  )

  @field_validator("depth_connection")
  @classmethod
  def _check_family(cls, name: str) -> str:
    if name not in connections.FAMILIES:
      raise ValueError(
        f"there is no such family of depth connections; use {', '.join(connections.FAMILIES)} (MUDD, DenseFormer and "
        f"DDFormer are {connections.DEFAULT})"
      )
    return name


def check_sizes(config) -> None:
  """Raises ValueError for a model without blocks. `config` has `base_num_decoder_layers` and `num_decoder_layers`."""
  if config.num_decoder_layers < 1:
    raise ValueError(f"base_num_decoder_layers={config.base_num_decoder_layers} makes no blocks; use at least 1.")


def refusals(config) -> Iterator[Refusal]:
  """Yields the settings that do not work with any family. `config` is a `MuddConfig` with `mudd=True`."""
  block, mudd = config.decoder_block.value, "mudd=True"
  yield Refusal(
    block not in blocks.DECODER_BLOCKS,
    f"decoder_block={block!r}",
    mudd,
    f"supported are {', '.join(blocks.DECODER_BLOCKS)}; use one of these",
  )
  spec = blocks.spec(config)
  layer = _layer(config)
  reads_sublayers = connections.family(config).reads == "sublayer"
  yield Refusal(
    spec.is_parallel and reads_sublayers,
    layer,
    f"depth_connection={config.depth_connection}",
    "its attention and FFN read one input in parallel; use a sequential decoder_block",
  )
  yield Refusal(
    spec.feed_forward_norm is None and reads_sublayers,
    layer,
    f"depth_connection={config.depth_connection}",
    "its FFN reads the sum of its input and attention without a norm, or does not read it; use a decoder_block such as "
    "llama2",
  )
  yield Refusal(
    spec.scales_output and reads_sublayers,
    layer,
    f"depth_connection={config.depth_connection}",
    "its layers multiply their output by a parameter, and the family keeps several arrays in its place; use a "
    "decoder_block such as gemma3",
  )
  interval = config.inhomogeneous_layer_cycle_interval
  yield Refusal(
    config.scan_layers and interval > 1 and (spec.cycle is None or bool(spec.sides)),
    f"inhomogeneous_layer_cycle_interval={interval}",
    f"{mudd} and {layer}",
    "MaxText scans its layers one by one; set it to 1",
  )
  length = spec.cycle.length if spec.cycle else None
  yield Refusal(
    config.scan_layers and interval > 1 and length is not None,
    f"inhomogeneous_layer_cycle_interval={interval}",
    f"{mudd} and {layer}",
    f"MaxText scans cycles of {length} of its layers, whatever the key says; set it to 1",
  )
  yield Refusal(
    config.scan_layers and spec.cycle is not None and spec.cycle.member is None and reads_sublayers,
    f"scan_layers=True with {layer}",
    f"depth_connection={config.depth_connection}",
    "MaxText scans its layers within cycles; set scan_layers=False",
  )
  yield Refusal(interval < 1, f"inhomogeneous_layer_cycle_interval={interval}", mudd, "set it to 1 or more")
  pattern = blocks.pattern(config)
  yield Refusal(
    config.scan_layers and interval % pattern != 0 and interval != config.num_decoder_layers,
    f"inhomogeneous_layer_cycle_interval={interval}",
    f"scan_layers=True and {layer}",
    f"the kinds of its layers come again after {pattern}; use a multiple of {pattern}",
  )
  leaves_out = spec.cycle is not None and not (spec.cycle.has_remainder or spec.cycle.length)
  yield Refusal(
    config.scan_layers and leaves_out and interval > 0 and config.num_decoder_layers % interval != 0,
    f"base_num_decoder_layers={config.base_num_decoder_layers}",
    f"scan_layers=True and inhomogeneous_layer_cycle_interval={interval}",
    f"MaxText scans whole cycles of layers and would leave some out; use a multiple of {interval}",
  )
  yield from _of_block(config, spec, layer)
  # The dtype of the configuration of a model; a member of an enum while that is read.
  weights = str(getattr(config.weight_dtype, "value", config.weight_dtype))
  quantization = config.quantization.value
  yield Refusal(
    bool(quantization) and (config.fused_qkv or block in _WITH_DELTA_NETS),
    f"quantization={quantization}",
    f"{mudd} and fused_qkv=True" if config.fused_qkv else f"{mudd} and {layer}",
    "a scale is of a whole kernel, whose columns read different streams; leave quantization empty",
  )
  yield Refusal(
    config.use_qwix_quantization and quantization in _ADDING_VARIABLES,
    f"quantization={quantization} with use_qwix_quantization=True",
    mudd,
    f"it adds variables to layers while the model runs; quantization={_ADDING_VARIABLES.get(quantization)} with "
    "use_qwix_quantization=False computes the same",
  )
  yield Refusal(
    weights.startswith("float8"),
    f"weight_dtype={weights}",
    mudd,
    "MaxText keeps such weights with scales, and those of connections have none; use weight_dtype=bfloat16 or float32",
  )
  yield from _hyper_streams(config, layer)
  yield Refusal(
    bool(config.engram_layers),
    f"engram_layers={list(config.engram_layers)}",
    mudd,
    "Engram adds to the input of a block, which is several streams, and MaxText leaves it out of single layers; leave "
    "it empty",
  )
  yield Refusal(
    config.shard_mode.value == "explicit" and not connections.family(config).takes_explicit_axes,
    "shard_mode=explicit",
    f"depth_connection={config.depth_connection}",
    "its sums leave sharding to the compiler; use shard_mode=auto, or depth_connection=dense",
  )
  yield Refusal(
    spec.cycle is not None and config.attention.startswith("vllm"),
    f"attention={config.attention}",
    f"{mudd} and {layer}",
    "layers in cycles do not return the caches that vLLM keeps; use another attention",
  )
  if config.use_multimodal:
    yield from _multimodal(config)
  if stacks.are_stacked(config):
    yield from _stacked(config)
  for name in ("ici_pipeline_parallelism", "dcn_pipeline_parallelism"):
    number = getattr(config, name)
    yield Refusal(
      number < 1, f"{name}={number}", mudd, "MaxText builds no pipeline then; set it to the number of stages, or to 1"
    )
  if stacks.num_stages(config) > 1:
    yield from of_pipeline(config)


def _of_block(config, spec: blocks.BlockSpec, layer: str) -> Iterator[Refusal]:
  """Yields the settings that do not work with a block."""
  block, number = config.decoder_block.value, config.mtp_num_layers
  yield Refusal(
    number > 0 and not spec.takes_mtp,
    f"mtp_num_layers={number}",
    layer,
    "MaxText cannot build its layers for multi-token prediction; set it to 0",
  )
  yield Refusal(
    number > 0 and config.scan_layers and spec.cycle is not None and not (spec.sides or block == "gemma3"),
    f"mtp_num_layers={number}",
    f"scan_layers=True and {layer}",
    "each block of multi-token prediction would be a whole cycle of layers; set scan_layers=False",
  )
  yield Refusal(
    bool(spec.sides) and config.enable_dropout and config.dropout_rate > 0,
    f"dropout_rate={config.dropout_rate}",
    f"mudd=True and {layer}",
    "MaxText runs two blocks in one layer, and each would drop out the output of the other; set it to 0",
  )
  yield Refusal(
    config.fused_qkv and not spec.takes_fused_qkv,
    "fused_qkv=True",
    layer,
    "it has other projections; set fused_qkv=False",
  )
  yield Refusal(
    spec.attention is None and not config.scan_layers,
    "scan_layers=False",
    layer,
    "its single layers return an array where MaxText's decoder takes a pair; set scan_layers=True",
  )
  plan = connections.plan(config)
  yield Refusal(
    spec.attention is None and any(map(plan.has_separate_norms, range(1, plan.num_blocks + 1))),
    layer,
    "separate streams or norms of queries, keys and values",
    "it has no attention; set mudd_ways=1 and mudd_first_block_norms=shared, or use the stream x alone in "
    "mudd_placements",
  )
  if spec.uses_earlier_kv:
    yield from _with_earlier_kv(config, layer)
  is_latent, dense = config.attention_type == "mla", config.first_num_dense_layers
  yield Refusal(
    is_latent and block != "deepseek",
    "attention_type='mla'",
    layer,
    "MaxText has latent attention in the block of deepseek; use 'global'",
  )
  if block == "deepseek":
    yield Refusal(
      not is_latent, f"attention_type={config.attention_type!r}", layer, "its attention is latent; use 'mla'"
    )
    yield Refusal(
      not 0 <= dense <= config.num_decoder_layers,
      f"first_num_dense_layers={dense}",
      f"base_num_decoder_layers={config.base_num_decoder_layers}",
      f"so many of the layers are dense; use a number from 0 to {config.num_decoder_layers}",
    )
  yield Refusal(
    is_latent and config.use_batch_split_schedule,
    "use_batch_split_schedule=True",
    "mudd=True",
    "it does not call the layers; set it to False",
  )
  yield Refusal(config.use_lineage, "use_lineage=True", "mudd=True", "it does not call the layers; set it to False")
  if block in _NAMES:
    names, does = _NAMES[block]
    yield Refusal(
      config.model_name not in names,
      f"model_name={config.model_name}",
      layer,
      f"MaxText {does} by the name of the model; use {', '.join(names)}, for other sizes with "
      "override_model_config=True",
    )
  if block == "deepseek4":
    yield from _deepseek4(config, layer)


def _deepseek4(config, layer: str) -> Iterator[Refusal]:
  """Yields the settings with which MaxText cannot build layers of compressed attention."""
  first, number, ratios = config.first_num_hash_layers, config.num_decoder_layers, config.compress_ratios
  sizes = f"base_num_decoder_layers={config.base_num_decoder_layers}"
  yield Refusal(
    config.attention_type != "compressed",
    f"attention_type={config.attention_type!r}",
    layer,
    "its attention is compressed; use 'compressed'",
  )
  yield Refusal(
    config.mhc_expansion_rate == 1,
    "mhc_expansion_rate=1",
    layer,
    "its layers have several residual streams; set it to 2 or more",
  )
  yield Refusal(
    not 0 <= first <= number,
    f"first_num_hash_layers={first}",
    sizes,
    "so many of the layers choose experts by tokens; use a number from 0 to that of all layers",
  )
  yield Refusal(
    len(ratios) < number,
    f"compress_ratios={ratios}",
    sizes,
    "every layer has its ratio; use as many as there are layers",
  )
  yield Refusal(
    config.scan_layers and ratios[first:number] != [128, 4] * ((number - first) // 2),
    f"compress_ratios={ratios}",
    f"scan_layers=True, first_num_hash_layers={first} and {sizes}",
    "MaxText scans pairs of layers with the ratios 128 and 4; use these in turn after the first layers",
  )


def _hyper_streams(config, layer: str) -> Iterator[Refusal]:
  """Yields the settings that do not work with MaxText's hyper-connections."""
  if config.mhc_expansion_rate == 1:
    return
  rate = f"mhc_expansion_rate={config.mhc_expansion_rate}"
  yield Refusal(
    config.decoder_block.value not in _WITH_HYPER_STREAMS,
    rate,
    layer,
    f"MaxText has several residual streams in the blocks {' and '.join(_WITH_HYPER_STREAMS)}; set it to 1",
  )
  yield Refusal(
    config.use_mhc_pallas_kernel,
    "use_mhc_pallas_kernel=True",
    f"mudd=True and {rate}",
    "it was not tried with separate streams; set it to False",
  )
  yield Refusal(
    connections.family(config).reads == "sublayer",
    rate,
    f"depth_connection={config.depth_connection}",
    "both make the input of every sublayer; set it to 1, or depth_connection=dense",
  )
  yield Refusal(
    config.mtp_num_layers > 0,
    f"mtp_num_layers={config.mtp_num_layers}",
    rate,
    "MaxText gives layers of multi-token prediction one residual stream, and they read several; set it to 0",
  )
  yield _extra_embeddings(config, rate, "MaxText makes its residual streams of one embedding")


def _extra_embeddings(config, setting: str, reason: str) -> Refusal:
  number = connections.plan(config).extra_embeddings
  return Refusal(number > 0, f"mudd_extra_embeddings={number}", setting, f"{reason}; set it to 0")


def _with_earlier_kv(config, layer: str) -> Iterator[Refusal]:
  """Yields the settings that do not work with layers that use keys and values of earlier ones."""
  from maxtext.models import gemma4_small  # imports JAX

  number, width = config.num_kv_shared_layers, config.hidden_size_per_layer_input
  kinds = gemma4_small.build_layer_types(config.num_decoder_layers, config.model_name)
  sharing = [x for x in range(len(kinds)) if gemma4_small.is_kv_shared_layer(x, len(kinds), number)]
  yield Refusal(
    config.scan_layers, "scan_layers=True", layer, "MaxText does not scan its layers; set scan_layers=False"
  )
  yield Refusal(
    any(gemma4_small.kv_donor_layer_idx(x, kinds, number) is None for x in sharing),
    f"num_kv_shared_layers={number}",
    f"base_num_decoder_layers={config.base_num_decoder_layers}",
    "a global layer would use keys and values of an earlier one, and there is none; set it to a lower number",
  )
  if width > 0 and config.vocab_size_per_layer_input > 0:
    setting = f"{layer} and hidden_size_per_layer_input={width}"
    yield _extra_embeddings(config, setting, "MaxText makes the inputs of layers from one embedding")


def _multimodal(config) -> Iterator[Refusal]:
  """Yields the settings that do not work where features of images replace token embeddings, in X_0."""
  multimodal, indexes = "mudd=True and use_multimodal=True", list(config.deepstack_visual_indexes_for_vit)
  yield Refusal(
    bool(indexes),
    f"deepstack_visual_indexes_for_vit={indexes}",
    multimodal,
    "visual features are added to block outputs, which are sources; leave it empty, or set use_multimodal=False",
  )
  yield _extra_embeddings(config, multimodal, "the further tables have rows for tokens and none for images")


def of_pipeline(config) -> Iterator[Refusal]:
  """Yields the settings that do not work where the stages of a pipeline pass on carries."""
  stages, layers = stacks.num_stages(config), config.num_decoder_layers
  pipeline, spec = f"mudd=True and a pipeline of {stages} stages", blocks.spec(config)
  length, rest = divmod(layers, stages)
  yield Refusal(
    rest > 0,
    f"num_decoder_layers={layers}",
    pipeline,
    "all stages have equally many blocks; use a multiple of the number of stages, or other parallelism",
  )
  yield Refusal(
    config.num_pipeline_repeats > 1,
    f"num_pipeline_repeats={config.num_pipeline_repeats}",
    pipeline,
    f"stages do not keep what earlier repeats computed; set num_layers_per_pipeline_stage={length} and "
    "num_pipeline_repeats=-1",
  )
  yield Refusal(
    config.pipeline_parallel_layers != layers,
    f"pipeline_parallel_layers={config.pipeline_parallel_layers}",
    pipeline,
    f"blocks outside the pipeline would not have the outputs of those within; set it to {layers}",
  )
  alike = ", ".join(name for name in sorted(blocks.DECODER_BLOCKS) if _has_equal_layers(blocks.BLOCKS[name]))
  yield Refusal(
    not _has_equal_layers(spec),
    _layer(config),
    pipeline,
    f"MaxText's stages are of layers that are all alike; use {alike}, mudd_decoder_layer=pythia, or no pipeline",
  )
  yield Refusal(
    config.mudd_ffn_reallocation,
    "mudd_ffn_reallocation=True",
    pipeline,
    "all stages have FFNs of one width; set it to False",
  )
  yield Refusal(
    any(site.mlp for site in connections.plan(config).sites.values()),
    "mudd_placements with mlp",
    pipeline,
    "each layer of a stage has a weight MLP of its own; leave mlp out",
  )
  weight = config.load_balance_loss_weight
  yield Refusal(
    config.num_experts > 1 and weight > 0,
    f"load_balance_loss_weight={weight}",
    pipeline,
    "MaxText takes the mean of the routers' losses over all turns, with those in which a stage is idle; set it to 0",
  )
  yield Refusal(
    config.eval_interval > 0 and config.eval_per_device_batch_size not in (0, config.per_device_batch_size),
    f"eval_per_device_batch_size={config.eval_per_device_batch_size:g}",
    pipeline,
    f"MaxText's pipeline takes batches of one size; set it to {config.per_device_batch_size:g}",
  )
  yield _extra_embeddings(config, pipeline, "MaxText's pipeline takes one array of embeddings")
  yield Refusal(
    config.mudd_mtp == "connected",
    "mudd_mtp=connected",
    pipeline,
    "the history stays in the stages, and multi-token prediction would read it behind them; use mudd_mtp=head",
  )
  yield Refusal(
    bool(config.record_internal_nn_metrics),
    f"record_internal_nn_metrics={config.record_internal_nn_metrics}",
    pipeline,
    "MaxText's pipeline returns metrics of every turn, of idle stages, too; set it to 0",
  )
  yield Refusal(
    config.shard_mode.value == "explicit", "shard_mode=explicit", pipeline, "it was not built; use shard_mode=auto"
  )
  yield Refusal(
    config.opt_type == "muon",
    "opt_type=muon",
    pipeline,
    "MaxText's Muon takes the axis of stages for the rows of matrices; use adamw",
  )
  yield Refusal(
    config.lora.enable_lora,
    "lora.enable_lora=True",
    pipeline,
    "stages take no adapters; train adapters with fsdp or tensor parallelism",
  )


def _layer(config) -> str:
  """The setting that chooses the decoder block."""
  is_pythia = config.mudd_decoder_layer == "pythia"
  return "mudd_decoder_layer=pythia" if is_pythia else f"decoder_block={config.decoder_block.value!r}"


def _has_equal_layers(row: blocks.BlockSpec) -> bool:
  return row.cycle is None and len(row.layers) == 1 and not row.uses_earlier_kv


def _stacked(config) -> Iterator[Refusal]:
  """Yields the settings that do not work where parameters of several layers are one array."""
  scanned = f"mudd=True and {'scan_layers=True' if config.scan_layers else 'a pipeline'}"
  yield Refusal(
    config.param_scan_axis not in (0, 1),
    f"param_scan_axis={config.param_scan_axis}",
    scanned,
    "norms have two dimensions where they are stacked; use 0 or 1",
  )
  yield Refusal(
    config.parameter_memory_host_offload,
    "parameter_memory_host_offload=True",
    scanned,
    "all layers would be kept on the device for the backward pass; set scan_layers=False",
  )
