"""What trains a CLIP encoder from nothing beside the encoder: its text side, and two readers of the features.

Only the contrastive stage uses it: the release takes EVA-CLIP trained, and its text tower is not part of BLIP3-o.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.models.text_decoder import TextDecoder, TextDecoderConfig
from blip3o_jax.nn.embeddings import grid_code
from blip3o_jax.nn.linear import Dense
from blip3o_jax.nn.norms import LayerNorm


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
  """text: a small causal decoder; dim: width of the shared space; patch_dim: numbers (3 a pixel) behind one feature."""

  text: TextDecoderConfig
  dim: int
  patch_dim: int


class TextTower(nn.Module):
  """(features, caption) -> two unit vectors and their logit scale; and what can be read out of features alone."""

  cfg: TextTowerConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.text = TextDecoder(cfg.text, **kinds)
    self.image_norm = LayerNorm(**kinds)
    self.image_proj = Dense(cfg.dim, ("embed", None), False, **kinds)
    self.text_proj = Dense(cfg.dim, ("embed", None), False, **kinds)
    # CLIP's initial temperature 0.07, kept below 100 (Radford et al., section 2.5).
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), (), jnp.float32)
    self.caption_in = Dense(cfg.text.dim, (None, "embed"), **kinds)
    self.patch_readout = Dense(cfg.patch_dim, ("embed", None), **kinds)

  def __call__(self, features: jax.Array, tokens: jax.Array, mask: jax.Array):
    """features [B, N, C], tokens [B, L], mask [B, L] -> ([B, dim], [B, dim], scalar), float32."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = self.text(self.text.embed(tokens), positions, mask).hidden
    last = jnp.maximum(jnp.sum(mask, axis=-1) - 1, 0)  # captions are padded on the right
    text = self.text_proj(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    image = self.image_proj(self.image_norm(jnp.mean(features, axis=1)))
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    scale = jnp.exp(jnp.minimum(self.logit_scale, np.log(100.0)))
    return unit(image.astype(jnp.float32)), unit(text.astype(jnp.float32)), scale

  def caption_logits(self, features: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Each caption token guessed from the features and the tokens before it: float32 [B, L, V].

    One causal pass of the text decoder over [features; caption].
    """
    b, n, _ = features.shape
    side = int(n**0.5)
    seen = self.caption_in(features) + jnp.asarray(grid_code(side, side, self.cfg.text.dim), self.dtype)
    x = jnp.concatenate([seen, self.text.embed(tokens)], axis=1)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    hidden = self.text(x, positions, jnp.concatenate([jnp.ones((b, n), bool), mask], axis=1)).hidden
    return self.text.logits(hidden[:, n - 1 : -1])

  def pixels(self, features: jax.Array) -> jax.Array:
    """A linear guess of the pixels behind each token: [B, N, C] -> float32 [B, N, patch_dim], about -1..1."""
    return self.patch_readout(features).astype(jnp.float32)

  def touch(self, features: jax.Array, tokens: jax.Array, mask: jax.Array) -> None:
    """Reach every parameter, for `init`."""
    self(features, tokens, mask), self.caption_logits(features, tokens, mask), self.pixels(features)
