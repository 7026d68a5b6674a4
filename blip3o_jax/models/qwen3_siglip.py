"""Qwen3 that sees through SigLIP2: the tower's tokens, projected, take the place of image tokens (spec part 8).

The branch of the release for text-only language models. No weights of it are public; Qwen3 and SigLIP2 are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.models.qwen2_5_vl import place_image_features
from blip3o_jax.models.siglip import Siglip, SiglipConfig, normalize
from blip3o_jax.models.text_decoder import KVCache, TextDecoder, TextDecoderConfig, TextOutput
from blip3o_jax.nn.linear import Dense
from blip3o_jax.nn.mlp import gelu

# The branch names its tower by hub id alone; this is the config.json there (google/siglip2-so400m-patch16-512).
_TOWER = {
  "hidden_size": 1152,
  "intermediate_size": 4304,
  "num_hidden_layers": 27,
  "num_attention_heads": 16,
  "image_size": 512,
  "patch_size": 16,
}


@dataclasses.dataclass(frozen=True)
class Qwen3SiglipConfig:
  """Text, vision, and the id of a place for one vector of a picture: `<image>`, the last of the three added tokens."""

  text: TextDecoderConfig
  vision: SiglipConfig
  image_token: int = 151671

  @property
  def dim(self) -> int:
    """Width of the hidden states."""
    return self.text.dim

  @classmethod
  def from_reference(
    cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
  ) -> "Qwen3SiglipConfig":
    """From a reference config.json: Qwen3's, and perhaps the tower's as `vision_config`.

    Args: see TextDecoderConfig.from_reference and SiglipConfig.from_reference.

    Raises:
      UserError: a tower that is not supported.
    """
    return cls(
      text=TextDecoderConfig.from_reference(config, shapes),
      vision=SiglipConfig.from_reference(config.get("vision_config") or _TOWER, shapes),
      image_token=config.get("image_token_id", cls.image_token),
    )

  def to_reference(self) -> dict[str, Any]:
    """config.json of Qwen3ForCausalLM, with what `from_reference` reads beside it."""
    return self.text.to_reference() | {
      "vision_config": self.vision.to_reference(),
      "mm_projector_type": "mlp2x_gelu",
      "image_token_id": self.image_token,
    }


class Projector(nn.Module):
  """mlp2x_gelu: Linear, exact GELU, Linear: [..., W] -> [..., dim] (spec 8)."""

  dim: int
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = gelu(Dense(self.dim, ("embed", "mlp"), name="fc1", **kinds)(x))
    return Dense(self.dim, ("mlp", "embed"), name="fc2", **kinds)(x)


class Qwen3Siglip(nn.Module):
  """Parameters {"text": ..., "vision": ..., "projector": ...}; a tree with "text" alone serves text-only calls."""

  image_keys = ("images",)  # arguments of `embed` beside the tokens, and their names in a batch

  cfg: Qwen3SiglipConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.text = TextDecoder(self.cfg.text, **kinds)
    self.vision_tower = Siglip(self.cfg.vision, name="vision", **kinds)
    self.projector = Projector(self.cfg.dim, **kinds)

  def vision(self, images: jax.Array) -> jax.Array:
    """Image embeddings of every row.

    All images are squares of one size with equally many tokens, so rows need no numbers beside the pixels: image i of a
    row gives its tokens i n .. (i + 1) n, and padding, which comes last, is never asked for. The images of a row stay
    together on an axis of their own, so that they are cut over devices as the rows are.

    Args:
      images: [B, I, S, S, 3], uint8, or float and then (x - 0.5) / 0.5 of colours in 0..1 already; padded per row with
        anything after the real ones.

    Returns:
      [B, I n, D] with n = (image_size / patch_size)^2: all of the tower's tokens after its final norm, row-major.
    """
    rows, count = images.shape[:2]
    images = normalize(images) if images.dtype == jnp.uint8 else images
    x = self.vision_tower(images.reshape(rows * count, *images.shape[2:])).last_hidden_state
    return self.projector(x.reshape(rows, -1, x.shape[-1]))

  def embed(self, tokens: jax.Array, images: jax.Array | None = None) -> jax.Array:
    """tokens int [B, L] -> [B, L, D], image tokens replaced by their images if these are given (see `vision`)."""
    x = self.text.embed(tokens)
    return x if images is None else place_image_features(x, tokens == self.cfg.image_token, self.vision(images))

  def decode(
    self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array, cache: KVCache | None = None
  ) -> TextOutput:
    """See TextDecoder.__call__; positions are plain, images included."""
    return self.text(embeddings, positions, mask, cache)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> float32 [..., V]."""
    return self.text.logits(hidden)

  def empty_cache(self, batch: int, slots: int) -> KVCache:
    return self.text.empty_cache(batch, slots)

  def __call__(self, tokens, positions, mask, images=None):
    """Logits float32 [B, L, V] of a conversation about pictures."""
    return self.logits(self.decode(self.embed(tokens, images), positions, mask).hidden)

  def touch(self) -> jax.Array:
    """The smallest call that reaches every parameter, for `init`."""
    tokens, size = jnp.full((1, 1), self.cfg.image_token), self.cfg.vision.image_size
    return self(tokens, tokens * 0, tokens >= 0, jnp.zeros((1, 1, size, size, 3)))
