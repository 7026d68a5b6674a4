"""What an understanding tower wants of pictures: preprocessor.json, in the keys of preprocessor_config.json."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from blip3o_jax.data.pictures import Pictures, QwenPictures, SiglipPictures
from blip3o_jax.data.vision import ImageProcessor
from blip3o_jax.models.blip3o import CLIP_MEAN, CLIP_STD, Blip3oConfig
from blip3o_jax.models.qwen2_5_vl import Qwen25VLConfig
from blip3o_jax.models.qwen3_siglip import Qwen3SiglipConfig


def default_preprocessor(config: Blip3oConfig) -> dict[str, Any]:
  """What the understanding tower of `config` wants; empty where it reads no pictures."""
  if isinstance(config.backbone, Qwen25VLConfig):
    return _qwen(config.backbone)
  return _siglip(config.backbone) if isinstance(config.backbone, Qwen3SiglipConfig) else {}


def open_pictures(config: Blip3oConfig, preprocessor: Mapping[str, Any]) -> Pictures | None:
  """What prepares pictures for the backbone of `config`, None if it reads none.

  Raises:
    UserError: the preprocessor is not one of this tower.
  """
  backbone = config.backbone
  if isinstance(backbone, Qwen25VLConfig):
    processor = ImageProcessor.from_reference(preprocessor)
    return QwenPictures(processor, backbone.image_token, backbone.vision.window_size)
  if isinstance(backbone, Qwen3SiglipConfig):
    size, count = backbone.vision.image_size, backbone.vision.side**2
    return SiglipPictures.from_reference(preprocessor, size=size, count=count, image_token=backbone.image_token)
  return None


def _qwen(backbone: Qwen25VLConfig) -> dict[str, Any]:
  """With the limits of Qwen2.5-VL in merged patches (spec 4.5)."""
  vision = backbone.vision
  block = (vision.patch_size * vision.merge_size) ** 2
  return {
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "patch_size": vision.patch_size,
    "merge_size": vision.merge_size,
    "temporal_patch_size": vision.temporal_patch_size,
    "min_pixels": 4 * block,
    "max_pixels": 16384 * block,
  }


def _siglip(backbone: Qwen3SiglipConfig) -> dict[str, Any]:
  """That of google/siglip2-so400m-patch16-512: squashed to a square (bilinear), colours to -1..1 (spec 8)."""
  size, half = backbone.vision.image_size, [0.5, 0.5, 0.5]
  return {
    "image_processor_type": "SiglipImageProcessor",
    "image_mean": half,
    "image_std": half,
    "size": {"height": size, "width": size},
    "resample": int(Image.Resampling.BILINEAR),
  }
