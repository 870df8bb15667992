"""The keys that say how optimizers treat the parameters of connections, and the settings that they do not work with."""

from collections.abc import Iterator
from typing import Literal

from maxtext_mudd import connections
from maxtext_mudd.connections.keys import KeyGroup, Refusal, key

_ON = {"mudd": (True,)}
# Whether the plugin has replaced MaxText's optimizers. MaxText with our patch uses the configuration without that.
are_replaced = False


class OptimizerKeys(KeyGroup):
  """The keys of parameters of connections. LN_q, LN_k and LN_v are no such parameters."""

  mudd_decay: Literal["auto", "all", "not_static", "matrices", "nothing"] = key(
    "auto",
    "Which parameters of connections have weight decay: all; all but static weights (a); only matrices that make "
    "weights (W1, W2); nothing. auto: matrices with opt_type=muon, all with other optimizers, as released.",
    needs=_ON,
  )
  mudd_learning_rate_factor: float = key(
    1.0, "Factor on the learning rate of the parameters of connections.", needs=_ON, gt=0, allow_inf_nan=False
  )
  mudd_muon_matrices: bool = key(
    True,
    "With opt_type=muon: whether matrices that make weights (W1 and W2; φ of mHC; W_α of Hyper-Connections) are "
    "orthogonalised; off: Adam trains them.",
    needs=_ON,
  )


def refusals(config) -> Iterator[Refusal]:
  """Yields the settings that do not work with these keys. `config` is a `MuddConfig` with `mudd=True`."""
  optimizer, family = config.opt_type.value, connections.family(config)
  changed = [
    f"{name}={getattr(config, name)}"
    for name, field in OptimizerKeys.model_fields.items()
    if getattr(config, name) != field.default
  ]
  yield Refusal(
    bool(changed) and config.depth_connection == "residual",
    changed[0] if changed else "",
    "depth_connection=residual",
    "it has no parameters; leave the key at its default",
  )
  settings = ["opt_type=muon"] * (optimizer == "muon") + changed
  yield Refusal(
    bool(settings) and config.depth_connection != "residual" and not are_replaced,
    settings[0] if settings else "",
    "mudd=True in MaxText's own commands",
    "their optimizers do not know the parameters of connections; use the commands of maxtext_mudd",
  )
  yield Refusal(
    config.mudd_decay != "auto" and optimizer == "sgd",
    f"mudd_decay={config.mudd_decay}",
    "opt_type=sgd",
    "it decays nothing; leave mudd_decay at auto",
  )
  yield Refusal(
    optimizer != "muon" and not config.mudd_muon_matrices,
    "mudd_muon_matrices=False",
    f"opt_type={optimizer}",
    "only Muon orthogonalises matrices; leave it at True",
  )
  has_matrices = bool(family.matrices) and getattr(config, "mudd_dynamic", True)
  yield Refusal(
    not config.mudd_muon_matrices and not has_matrices,
    "mudd_muon_matrices=False",
    f"depth_connection={config.depth_connection}",
    "its connections have no matrices; leave it at True",
  )
  has_static = bool(family.static_weights) and getattr(config, "mudd_static", True)
  yield Refusal(
    config.mudd_decay == "not_static" and not has_static,
    "mudd_decay=not_static",
    f"depth_connection={config.depth_connection}",
    "its connections have no static weights that are learned; use all",
  )
  yield Refusal(
    config.mudd_decay == "matrices" and not has_matrices,
    "mudd_decay=matrices",
    f"depth_connection={config.depth_connection}",
    "its connections have no matrices; use nothing",
  )
  if optimizer == "muon":
    yield from _muon(config)


def _muon(config) -> Iterator[Refusal]:
  muon = "opt_type=muon and mudd=True"
  yield Refusal(
    config.muon_type not in ("optax", "optax_muon"),
    f"muon_type={config.muon_type}",
    muon,
    "it does not take the matrices of connections as they are; use muon_type=optax_muon",
  )
  yield Refusal(
    config.scan_layers and config.param_scan_axis != 1,
    f"param_scan_axis={config.param_scan_axis}",
    muon,
    "MaxText's Muon takes axis 1 of the parameters of scanned layers for the number of the layer; use 1",
  )
