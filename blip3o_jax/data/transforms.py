"""Pictures: decoding, the release's two ways to a square, and normalisation on the device (spec 5.4)."""

import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from blip3o_jax.data.vision import CLIP_MEAN, CLIP_STD
from blip3o_jax.errors import UserError


def decode(content: bytes, name: str = "picture") -> Image.Image:
  """An RGB PIL image. Raises UserError naming the picture when the bytes are no image."""
  try:
    return Image.open(io.BytesIO(content)).convert("RGB")
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError(f"{name} cannot be decoded: {error}") from None


def square(image: Image.Image, size: int, mode: str = "crop") -> np.ndarray:
  """uint8 [size, size, 3].

  mode "crop": shortest side to `size` (bicubic, antialiased), then the centre, as the release trains; "squash": the
  aspect ratio is lost, as its inference pipeline does.
  """
  if mode not in ("crop", "squash"):
    raise UserError(f"resize mode {mode!r} is unknown; choose crop or squash")
  width, height = image.size
  if mode == "crop":
    # The longer side is truncated and the crop offset rounded, as torchvision does.
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
  else:
    width = height = size
  if (width, height) != image.size:
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = round((width - size) / 2), round((height - size) / 2)
  return np.asarray(image)[top : top + size, left : left + size]


def normalize(pixels: jax.Array, mean=CLIP_MEAN, std=CLIP_STD) -> jax.Array:
  """uint8 [..., 3] -> float32 (pixels / 255 - mean) / std, on the device."""
  return (pixels.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)
