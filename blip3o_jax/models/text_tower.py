"""The text side of contrastive training, and the read-outs of the image side.

Only the contrastive stage uses it: the release takes EVA-CLIP trained, and its text tower is not part of BLIP3-o.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.models.text_decoder import TextDecoder, TextDecoderConfig
from blip3o_jax.nn.linear import Dense
from blip3o_jax.nn.norms import LayerNorm


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
  """text: a small causal decoder; dim: width of the shared space; patch_dim: numbers (3 a pixel) behind one feature."""

  text: TextDecoderConfig
  dim: int
  patch_dim: int


class TextTower(nn.Module):
  """(features, caption) -> two unit vectors, their logit scale, and a linear guess of the pixels behind each token."""

  cfg: TextTowerConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array, tokens: jax.Array, mask: jax.Array):
    """features [B, N, C], tokens [B, L], mask [B, L] -> ([B, dim], [B, dim], scalar, [B, N, patch_dim]), float32."""
    kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    text = TextDecoder(self.cfg.text, name="text", **kinds)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = text(text.embed(tokens), positions, mask).hidden
    last = jnp.maximum(jnp.sum(mask, axis=-1) - 1, 0)  # captions are padded on the right
    pooled_text = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    pooled_image = LayerNorm(name="image_norm", **kinds)(jnp.mean(features, axis=1))
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    image = unit(
      Dense(self.cfg.dim, ("embed", None), False, name="image_proj", **kinds)(pooled_image).astype(jnp.float32)
    )
    text = unit(Dense(self.cfg.dim, ("embed", None), False, name="text_proj", **kinds)(pooled_text).astype(jnp.float32))
    # CLIP's initial temperature 0.07, kept below 100 (Radford et al., section 2.5).
    log_scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), (), jnp.float32)
    scale = jnp.exp(jnp.minimum(log_scale, np.log(100.0)))
    patches = Dense(self.cfg.patch_dim, ("embed", None), name="patch_readout", **kinds)(features)
    return image, text, scale, patches.astype(jnp.float32)
