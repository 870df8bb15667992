"""The train step and the evaluation step of an image classifier, sharded over a mesh by data and FSDP."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8
import numpy as np
import optax

from maxtext_mudd.config.errors import ConfigError
from maxtext_mudd.vit.config import VitConfig
from maxtext_mudd.vit.model import ViT, family_of

AXES = ("data", "fsdp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a run trains and saves.

  Attributes:
    params: parameters of the model, float32.
    optimizer: state of the optimizer.
    step: how many steps are done.
  """

  params: Any
  optimizer: Any
  step: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled functions of a run, and how arrays lie on the mesh.

  Attributes:
    init: () -> TrainState of step 0.
    train: (TrainState, images uint8 [B,H,W,C], labels int32 [B]) -> (TrainState, {"loss", "grad_norm"}).
    evaluate: (params, images, labels, mask bool [B]) -> sums over the images with a mask: of the cross entropy, and of
      those whose class is the most probable one.
    shardings: of a TrainState.
    of_batch: the sharding of batches.
    parameters: their number.
  """

  init: Callable[[], TrainState]
  train: Callable
  evaluate: Callable
  shardings: TrainState
  of_batch: NamedSharding
  parameters: int

  @property
  def abstract_state(self) -> TrainState:
    shapes = jax.eval_shape(self.init)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings)

  def place(self, batch: dict[str, np.ndarray]) -> list[jax.Array]:
    """The arrays of a batch on the mesh: images, labels, and the mask if there is one."""
    return [jax.device_put(batch[name], self.of_batch) for name in ("image", "label", "mask") if name in batch]


def make_mesh(config: VitConfig) -> jax.sharding.Mesh:
  """The mesh of all devices.

  Raises:
    ConfigError: the devices or the batch cannot be divided so.
  """
  devices = jax.device_count()
  if devices % config.fsdp:
    raise ConfigError(f"fsdp={config.fsdp} does not divide the {devices} devices; use a divisor of {devices}.")
  data = devices // config.fsdp
  if config.data_parallelism not in (-1, data):
    raise ConfigError(
      f"data_parallelism={config.data_parallelism} times fsdp={config.fsdp} is not the number of devices, {devices}; "
      f"use data_parallelism={data}."
    )
  if config.batch_size % devices:
    raise ConfigError(f"batch_size={config.batch_size} is not a multiple of the {devices} devices; use one.")
  return jax.make_mesh((data, config.fsdp), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def learning_rate(config: VitConfig) -> optax.Schedule:
  """By the number of steps done: linear from 0, then a cosine to 0 at the last step."""
  return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.steps)


def make_optimizer(config: VitConfig) -> optax.GradientTransformation:
  """AdamW with a limit on the norm of gradients. Kernels and the matrices of connections are decayed."""
  decayed = {"kernel", *family_of(config).matrices}

  def is_decayed(params):
    return nnx.map_state(lambda path, _: path[-1] in decayed, params)

  clip = [optax.clip_by_global_norm(config.gradient_clip)] if config.gradient_clip else []
  adam = optax.adamw(
    learning_rate(config), config.adam_b1, config.adam_b2, weight_decay=config.weight_decay, mask=is_decayed
  )
  return optax.chain(*clip, adam)


def make_program(config: VitConfig, mesh: jax.sharding.Mesh) -> Program:
  """The functions of a run. Each is compiled when it is first called."""
  optimizer = make_optimizer(config)
  build = functools.partial(ViT, config, mesh)
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(config.seed))), nnx.Param)

  def model(params):
    return nnx.merge(graphdef, params)

  def init():
    params = nnx.pure(nnx.state(build(nnx.Rngs(config.seed)), nnx.Param))
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

  def train(state: TrainState, images: UInt8[Array, "B H W C"], labels: Int[Array, " B"]):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
    inputs, targets = to_inputs(images), jax.nn.one_hot(labels, config.classes)
    if config.mixup:
      inputs, targets = mix_up(keys[0], config.mixup, inputs, targets)

    def loss(params):
      logits = model(params)(inputs, jax.random.key_data(keys[1]))
      return optax.softmax_cross_entropy(logits, targets).mean()

    value, gradients = jax.value_and_grad(loss)(state.params)
    updates, of_optimizer = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": value, "grad_norm": optax.global_norm(gradients)}
    return TrainState(params, of_optimizer, state.step + 1), metrics

  def evaluate(params, images: UInt8[Array, "B H W C"], labels: Int[Array, " B"], mask: Bool[Array, " B"]):
    logits = model(params)(to_inputs(images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (losses * mask).sum(), ((logits.argmax(-1) == labels) & mask).sum()

  shapes = jax.eval_shape(init)
  shardings = jax.tree.map(lambda x: NamedSharding(mesh, _fsdp(x.shape, config.fsdp)), shapes)
  of_batch, whole = NamedSharding(mesh, P(AXES)), NamedSharding(mesh, P())
  return Program(
    init=jax.jit(init, out_shardings=shardings),
    train=jax.jit(
      train, donate_argnums=0, in_shardings=(shardings, of_batch, of_batch), out_shardings=(shardings, whole)
    ),
    evaluate=jax.jit(evaluate, in_shardings=(shardings.params, of_batch, of_batch, of_batch), out_shardings=whole),
    shardings=shardings,
    of_batch=of_batch,
    parameters=sum(x.size for x in jax.tree.leaves(shapes.params)),
  )


def to_inputs(images: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
  """Pixels from 0..255 to -1..1."""
  return images.astype(jnp.float32) / 127.5 - 1


def mix_up(
  key: Array, p: float, inputs: Float[Array, "B H W C"], targets: Float[Array, "B K"]
) -> tuple[Float[Array, "B H W C"], Float[Array, "B K"]]:
  """MixUp as in big_vision: every image keeps the larger of the two shares, one for the batch, and the rest is of the
  image before it."""
  share = jax.random.beta(key, p, p)
  share = jnp.maximum(share, 1 - share)
  return tuple(share * x + (1 - share) * jnp.roll(x, 1, axis=0) for x in (inputs, targets))


def _fsdp(shape: tuple[int, ...], devices: int) -> P:
  """How a parameter is sharded: along its largest axis that the devices divide."""
  sizes = [size if size % devices == 0 else 0 for size in shape]
  if devices == 1 or not any(sizes):
    return P()
  axis = int(np.argmax(sizes))
  return P(*(None for _ in range(axis)), "fsdp")
