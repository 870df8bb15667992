"""Small models that take images, with MaxText's own vision towers, and batches with an image in each row."""

import numpy as np

from tests import models
from tests.blocks import config_of

FIRST = 3  # tokens before the image
_TOWER = {
  "use_multimodal": True,
  "override_model_config": True,
  "conv_stride_for_vit": 4,
  "patch_size_for_vit": 4,
  "hidden_size_for_vit": 8,
  "intermediate_size_for_vit": 32,
  "num_hidden_layers_for_vit": 1,
  "num_attention_heads_for_vit": 2,
}
# By block: keys; the token that stands for an image, which is not in these small vocabularies (nor in that of Gemma 3);
# tokens of an image; shape of the image.
MODELS = {
  # Gemma 3's tower makes 256 tokens of an image, whatever its size.
  "gemma3": (
    {"image_size_for_vit": 64, "max_target_length": 272, "base_num_decoder_layers": 7},
    262144,
    256,
    (1, 64, 64, 3),
  ),
  "gemma4, tied values": (
    {
      "model_name": "gemma4-31b",
      "image_size_for_vit": [16, 16],
      "vision_output_length": 4,
      "num_position_embeddings_for_vit": 16,
      "global_head_dim": 32,
      "global_num_kv_heads": 1,
      "base_num_decoder_layers": 7,
    },
    258880,
    4,
    (1, 16, 16, 3),
  ),
  "llama4": (
    {
      "model_name": "llama4-17b-16e",
      "image_size_for_vit": 16,
      "tile_size_for_vit": 16,
      "vision_output_dim_for_vit": 8,
      "projector_input_dim_for_vit": 8,
      "projector_output_dim_for_vit": 8,
      "base_num_decoder_layers": 4,
    },
    200092,
    8,
    (2, 3, 16, 16),
  ),
  "qwen3_5": (
    {
      "model_name": "qwen3.5-35b-a3b",
      "image_size_for_vit": 16,
      "num_position_embeddings_for_vit": 16,
      "out_hidden_size_for_vit": 32,
      "mrope_section": [1, 1, 0],
      "base_num_decoder_layers": 2,
    },
    248056,
    4,
    (3, 2, 16, 16),
  ),
}


def multimodal(block, **overrides):
  """The configuration of a model of a block that takes images."""
  return config_of(block, **(_TOWER | MODELS[block][0] | overrides))


def batch(block, config, seed=0) -> dict[str, np.ndarray]:
  """A random batch as MaxText's pipelines make it for images."""
  _, placeholder, number, shape = MODELS[block]
  data = models.batch(config)
  data["inputs"][:, FIRST : FIRST + number] = placeholder
  rows = len(data["inputs"])
  rng = np.random.default_rng(seed)
  data["images"] = rng.standard_normal((rows, *shape)).astype(np.float32)
  if block == "llama4":
    data["image_masks"] = np.ones((rows, shape[0]), np.int32)
  if config.use_mrope:
    data["inputs_position"] = np.broadcast_to(data["inputs_position"][..., None], (*data["inputs"].shape, 3))
  return data


def logits(model, data):
  images = {"encoder_images": data["images"], "encoder_image_masks": data.get("image_masks")}
  inputs = data["inputs"], data["inputs_position"], data["inputs_segmentation"]
  return model(*inputs, **images, enable_dropout=False)
