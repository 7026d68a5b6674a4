"""Qwen2.5-VL: a vision tower whose merged patches take the place of image tokens in a text decoder.

Source of the semantics: transformers, models/qwen2_5_vl; sizes of the public checkpoints in spec 10.4.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.models.text_decoder import KVCache, TextDecoder, TextDecoderConfig, TextOutput
from blip3o_jax.nn import rope
from blip3o_jax.nn.attention import attention
from blip3o_jax.nn.linear import Dense
from blip3o_jax.nn.mlp import SwiGLU, gelu
from blip3o_jax.nn.norms import RMSNorm
from blip3o_jax.nn.stack import scan_layers


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower; defaults are those of the public checkpoints. `window_size` is in pixels."""

  out_dim: int
  patch_size: int = 14
  temporal_patch_size: int = 2
  in_channels: int = 3
  dim: int = 1280
  layers: int = 32
  heads: int = 16
  mlp_dim: int = 3420
  merge_size: int = 2
  window_size: int = 112
  full_layers: tuple[int, ...] = (7, 15, 23, 31)
  rope_theta: float = 1e4
  norm_eps: float = 1e-6
  remat: str = "none"

  @property
  def patch_dim(self) -> int:
    return self.in_channels * self.temporal_patch_size * self.patch_size**2

  @classmethod
  def from_reference(cls, config: Mapping[str, Any]) -> "VisionConfig":
    """From the `vision_config` of a reference config.json, new or old (`in_chans`) names; absent keys are defaults."""
    names = {
      "out_hidden_size": "out_dim",
      "patch_size": "patch_size",
      "temporal_patch_size": "temporal_patch_size",
      "in_chans": "in_channels",
      "in_channels": "in_channels",
      "hidden_size": "dim",
      "depth": "layers",
      "num_heads": "heads",
      "intermediate_size": "mlp_dim",
      "spatial_merge_size": "merge_size",
      "window_size": "window_size",
    }
    fields = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    full = tuple(config.get("fullatt_block_indexes", cls.full_layers))
    theta = (config.get("rope_parameters") or {}).get("rope_theta", cls.rope_theta)
    return cls(**fields, full_layers=full, rope_theta=float(theta))

  def to_reference(self) -> dict[str, Any]:
    """`vision_config` of a reference config.json."""
    return {
      "model_type": "qwen2_5_vl",
      "out_hidden_size": self.out_dim,
      "patch_size": self.patch_size,
      "spatial_patch_size": self.patch_size,
      "temporal_patch_size": self.temporal_patch_size,
      "in_channels": self.in_channels,
      "in_chans": self.in_channels,
      "hidden_size": self.dim,
      "depth": self.layers,
      "num_heads": self.heads,
      "intermediate_size": self.mlp_dim,
      "hidden_act": "silu",
      "spatial_merge_size": self.merge_size,
      "window_size": self.window_size,
      "fullatt_block_indexes": list(self.full_layers),
      "tokens_per_second": 2,
    }


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig:
  """Text, vision, and the ids that mark pictures in the token sequence."""

  text: TextDecoderConfig
  vision: VisionConfig
  image_token: int = 151655
  video_token: int = 151656
  vision_start: int = 151652
  vision_end: int = 151653

  @property
  def dim(self) -> int:
    """Width of the hidden states."""
    return self.text.dim

  @classmethod
  def from_reference(
    cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
  ) -> "Qwen25VLConfig":
    """From a reference config.json, nested or flat; see TextDecoderConfig.from_reference."""
    return cls(
      text=TextDecoderConfig.from_reference(config, shapes),
      vision=VisionConfig.from_reference(config["vision_config"]),
      image_token=config.get("image_token_id", cls.image_token),
      video_token=config.get("video_token_id", cls.video_token),
      vision_start=config.get("vision_start_token_id", cls.vision_start),
      vision_end=config.get("vision_end_token_id", cls.vision_end),
    )

  def to_reference(self) -> dict[str, Any]:
    """config.json of `Qwen2_5_VLForConditionalGeneration`, flat as on the hub."""
    return self.text.to_reference() | {
      "architectures": ["Qwen2_5_VLForConditionalGeneration"],
      "model_type": "qwen2_5_vl",
      "vision_config": self.vision.to_reference(),
      "image_token_id": self.image_token,
      "video_token_id": self.video_token,
      "vision_start_token_id": self.vision_start,
      "vision_end_token_id": self.vision_end,
    }


class VisionBlock(nn.Module):
  """One pre-norm block of the vision tower: attention in windows or over the image, then a gated MLP."""

  cfg: VisionConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, full, phase, image, window):
    """x [B, P, D]; full: scalar bool, attend over the whole image rather than the window."""
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    y = RMSNorm(cfg.norm_eps, name="norm1", **kinds)(x)
    heads = lambda name: Dense(cfg.dim, ("embed", "heads"), name=name, **kinds)(y).reshape(
      *x.shape[:2], cfg.heads, cfg.dim // cfg.heads
    )
    q, k, v = rope.rotate_halves(heads("q"), phase), rope.rotate_halves(heads("k"), phase), heads("v")
    segment = jnp.where(full, image, window)
    y = attention(q, k, v, segments=(segment, segment)).reshape(x.shape)
    x = x + Dense(cfg.dim, ("heads", "embed"), name="proj", **kinds)(y)
    y = RMSNorm(cfg.norm_eps, name="norm2", **kinds)(x)
    x = x + SwiGLU(cfg.mlp_dim, use_bias=True, name="mlp", **kinds)(y)
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    self.sow("intermediates", "block_out", x)
    return x, None


class VisionTower(nn.Module):
  """Patches -> image embeddings. Sows `layers/block_out`, [layers, B, P, D]."""

  cfg: VisionConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, patches, patch_pos, patch_image, patch_window):
    """See Qwen25VL.vision.

    The release gathers patches window by window; masks by window number give the same sums without moving anything.
    """
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    b, count, _ = patches.shape
    x = Dense(cfg.dim, (None, "embed"), use_bias=False, name="patch_embed", **kinds)(patches)
    size = cfg.dim // cfg.heads
    phase = rope.phases(patch_pos, *rope.concatenated_channels((size // 2, size // 2), cfg.rope_theta))
    full = jnp.asarray([i in cfg.full_layers for i in range(cfg.layers)])
    layers = scan_layers(VisionBlock, cfg.layers, remat=cfg.remat, in_axes=(0, *(nn.broadcast,) * 3))
    x, _ = layers(cfg, name="layers", **kinds)(x, full, phase, patch_image, patch_window)
    x = RMSNorm(cfg.norm_eps, name="merger_norm", **kinds)(x)
    x = x.reshape(b, count // cfg.merge_size**2, -1)
    x = Dense(x.shape[-1], ("embed", "mlp"), name="merger_fc1", **kinds)(x)
    return Dense(cfg.out_dim, ("mlp", "embed"), name="merger_fc2", **kinds)(gelu(x))


def place_image_features(embeddings: jax.Array, is_image: jax.Array, features: jax.Array) -> jax.Array:
  """The n-th image token of a row becomes the n-th feature of that row.

  Args:
    embeddings: [B, L, D]; is_image: bool [B, L]; features: [B, M, D], padding after the real ones.
  """
  order = jnp.clip(jnp.cumsum(is_image, axis=-1) - 1, 0, features.shape[1] - 1)
  placed = jnp.take_along_axis(features, order[..., None], axis=1)
  return jnp.where(is_image[..., None], placed.astype(embeddings.dtype), embeddings)


class Qwen25VL(nn.Module):
  """Parameters {"text": ..., "vision": ...}; a tree without "vision" serves text-only calls."""

  # Arguments of `embed` beside the tokens, and their names in a batch (DESIGN part 3).
  image_keys = ("patches", "patch_pos", "patch_image", "patch_window")

  cfg: Qwen25VLConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.text = TextDecoder(self.cfg.text, **kinds)
    self.vision_tower = VisionTower(self.cfg.vision, name="vision", **kinds)

  def vision(
    self, patches: jax.Array, patch_pos: jax.Array, patch_image: jax.Array, patch_window: jax.Array
  ) -> jax.Array:
    """Image embeddings of every row.

    Args:
      patches: [B, P, patch_dim], the patches of the row's images one after another, each image merge block by merge
        block as the Qwen image processor emits them; padding after them.
      patch_pos: int [B, P, 2], (row, column) in the image's patch grid.
      patch_image: int [B, P], number of the image (of the frame) in the row, -1 = padding. Full attention: same image.
      patch_window: int [B, P], number of the window in the row, -1 = padding. Window attention: same window.

    Returns:
      [B, P / merge^2, D], merge blocks in the order of the patches.
    """
    return self.vision_tower(patches, patch_pos, patch_image, patch_window)

  def embed(self, tokens: jax.Array, patches=None, patch_pos=None, patch_image=None, patch_window=None) -> jax.Array:
    """tokens int [B, L] -> [B, L, D], image tokens replaced by their images if `patches` are given (see `vision`)."""
    x = self.text.embed(tokens)
    if patches is None:
      return x
    features = self.vision(patches, patch_pos, patch_image, patch_window)
    return place_image_features(x, tokens == self.cfg.image_token, features)

  def decode(
    self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array, cache: KVCache | None = None
  ) -> TextOutput:
    """See TextDecoder.__call__."""
    return self.text(embeddings, positions, mask, cache)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> float32 [..., V]."""
    return self.text.logits(hidden)

  def empty_cache(self, batch: int, slots: int) -> KVCache:
    return self.text.empty_cache(batch, slots)

  def __call__(self, tokens, positions, mask, patches=None, patch_pos=None, patch_image=None, patch_window=None):
    """Logits float32 [B, L, V] of a conversation about pictures."""
    x = self.embed(tokens, patches, patch_pos, patch_image, patch_window)
    return self.logits(self.decode(x, positions, mask).hidden)

  def touch(self) -> jax.Array:
    """The smallest call that reaches every parameter, for `init`."""
    count, tokens = self.cfg.vision.merge_size**2, jnp.full((1, 1), self.cfg.image_token)
    zeros = jnp.zeros((1, count), jnp.int32)
    patches = jnp.zeros((1, count, self.cfg.vision.patch_dim))
    return self(tokens, tokens * 0, tokens >= 0, patches, jnp.zeros((1, count, 2), jnp.int32), zeros, zeros)
