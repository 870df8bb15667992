"""Configurations changed in a few keys: equal by value, as JAX wants static data, and copied with their changes."""

import copy
import pickle

from maxtext.configs import pyconfig
import pytest

from maxtext_mudd.config.changed import changed
from tests import models


def test_values():
  config = models.config()
  narrow = changed(config, mlp_dim=32, moe_mlp_dim=32)
  assert (narrow.mlp_dim, narrow.moe_mlp_dim, narrow.emb_dim) == (32, 32, config.emb_dim)
  assert narrow.get_keys() == config.get_keys() | {"mlp_dim": 32, "moe_mlp_dim": 32}
  assert config.mlp_dim == 64
  with pytest.raises(ValueError, match="read-only"):
    narrow.mlp_dim = 48
  with pytest.raises(AttributeError, match="mlp_width is not a configuration key"):
    changed(config, mlp_width=32)


def test_equality():
  config = models.config()
  narrow = changed(config, mlp_dim=32)
  for same in (changed(config, mlp_dim=32), changed(changed(config, mlp_dim=48), mlp_dim=32)):
    assert narrow == same and hash(narrow) == hash(same)
  twice = changed(changed(config, moe_mlp_dim=48), mlp_dim=32)
  assert twice == changed(config, mlp_dim=32, moe_mlp_dim=48)
  for other in (config, changed(config, mlp_dim=48), twice, changed(models.config(), mlp_dim=32)):
    assert narrow != other


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "pickled"])
def test_copies(copied):
  config = models.config()
  pair = copied([changed(config, mlp_dim=32), changed(config, mlp_dim=32)])
  assert pair[0] == pair[1]  # of one base still
  assert (pair[0].mlp_dim, pair[0].emb_dim) == (32, config.emb_dim)


def test_what_maxtext_makes_of_one_keeps_the_changes():
  narrow = changed(models.config(), mlp_dim=32)
  again = pyconfig.HyperParameters(narrow._pydantic_config.model_copy(update={"max_target_length": 8}))
  assert (again.mlp_dim, again.max_target_length) == (32, 8)
