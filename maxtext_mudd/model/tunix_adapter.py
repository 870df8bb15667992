"""Gives models that MaxText does not know by name the call signature of Tunix' trainers, which DPO needs."""

from flax import nnx
from maxtext.checkpoint_conversion.utils.hf_model_configs import HF_MODEL_CONFIGS


def without_model_name(stock):
  """Makes a `TunixMaxTextAdapter` that also takes models whose `model_name` is not in MaxText's tables.

  MaxText looks the model up in a table of the parameters' names in vLLM. Training does not use these names, and models
  with connections have no vLLM model.

  Args:
    stock: MaxText's `TunixMaxTextAdapter`.
  """

  class MuddTunixAdapter(stock):
    def __init__(self, base_model, use_standalone_mappings=True, use_no_op_mappings=False, pad_id=None):
      config = base_model.config
      if config.model_name in HF_MODEL_CONFIGS and not config.mudd:
        super().__init__(base_model, use_standalone_mappings, use_no_op_mappings, pad_id)
        return
      nnx.Module.__init__(self)
      self.base = base_model
      self.use_no_op_mappings = True
      self._pad_id = pad_id

  return MuddTunixAdapter
