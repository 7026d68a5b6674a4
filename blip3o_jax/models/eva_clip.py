"""The EVA-CLIP visual tower (EVA-CLIP-E/14+): its pooled features are what the diffusion transformer learns to draw."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.errors import UserError, require_plain
from blip3o_jax.nn.attention import attention
from blip3o_jax.nn.linear import Dense
from blip3o_jax.nn.mlp import gelu
from blip3o_jax.nn.norms import LayerNorm
from blip3o_jax.nn.stack import scan_layers

# Entries of `vision_cfg` that leave no mark on names and shapes: norms after the branches, positions that are learned.
_PLAIN = {"postnorm": True, "rope": False}


@dataclasses.dataclass(frozen=True)
class EvaClipConfig:
  """The tower (spec 5.1). `norm_init` is the gain at which the post-norms of the branches start in a fresh model."""

  image_size: int
  patch_size: int
  width: int
  layers: int
  heads: int
  mlp_dim: int
  pool_stride: int = 4
  norm_eps: float = 1e-6
  norm_init: float = 1.0
  remat: str = "none"

  @property
  def side(self) -> int:
    """Patches along one side of the image."""
    return self.image_size // self.patch_size

  @classmethod
  def from_reference(
    cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
  ) -> "EvaClipConfig":
    """From the reference's config.json: `vision_cfg`, and `gen_pooling`, whose last number is the pooling stride.

    Raises:
      UserError: another kind of EVA-CLIP.
    """
    vision = config["vision_cfg"]
    require_plain("EVA-CLIP config", vision, _PLAIN)
    width = vision["width"]
    # int(), as the reference rounds: 1792 * 8.571428571428571 -> 15360. The tensor has the last word.
    mlp_dim = (shapes or {}).get("blocks.0.mlp.fc1.weight", (int(width * vision["mlp_ratio"]),))[0]
    return cls(
      image_size=vision["image_size"],
      patch_size=vision["patch_size"],
      width=width,
      layers=vision["layers"],
      heads=width // vision["head_width"],
      mlp_dim=mlp_dim,
      pool_stride=_stride(config),
    )

  @classmethod
  def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> "EvaClipConfig":
    """From the weights (spec 10.3); what they do not tell (head width, pooling) from `config`, or it is the release's.

    Raises:
      UserError: the width is no multiple of the head width, or the config tells of another kind of EVA-CLIP.
    """
    rows, width = shapes["pos_embed"][-2:]
    patch = shapes["patch_embed.proj.weight"][-1]
    vision = config.get("vision_cfg") or {}
    require_plain("EVA-CLIP config", vision, _PLAIN)
    head_width = vision.get("head_width", 112)
    if width % head_width:
      raise UserError(
        f"EVA-CLIP is {width} wide, no multiple of {head_width}; say vision_cfg.head_width in config.json"
      )
    return cls(
      image_size=patch * math.isqrt(rows - 1),
      patch_size=patch,
      width=width,
      layers=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
      heads=width // head_width,
      mlp_dim=shapes["blocks.0.mlp.fc1.weight"][0],
      pool_stride=_stride(config),
    )

  def to_reference(self) -> dict[str, Any]:
    """What `from_reference` reads."""
    head_width, ratio = self.width // self.heads, self.mlp_dim / self.width
    vision = {"image_size": self.image_size, "patch_size": self.patch_size, "width": self.width, "layers": self.layers}
    return {
      "vision_cfg": vision | {"head_width": head_width, "mlp_ratio": ratio},
      "gen_pooling": f"early_pool2d_{self.pool_stride}",
    }


def _stride(config: Mapping[str, Any]) -> int:
  """The number at the end of `gen_pooling`."""
  return int(config.get("gen_pooling", "early_pool2d_4").rsplit("_", 1)[-1])


class Block(nn.Module):
  """x + LN(attention(x)), then x + LN(MLP(x)): the norms sit on the branches, not on the stream (spec 5.2)."""

  cfg: EvaClipConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array):
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    gain = nn.initializers.constant(cfg.norm_init)
    norm = lambda name: LayerNorm(cfg.norm_eps, scale_init=gain, name=name, **kinds)
    heads = lambda name: Dense(cfg.width, ("embed", "heads"), name=name, **kinds)(x).reshape(
      *x.shape[:2], cfg.heads, cfg.width // cfg.heads
    )
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    y = attention(heads("q"), heads("k"), heads("v")).reshape(x.shape)
    y = Dense(cfg.width, ("heads", "embed"), name="proj", **kinds)(y)
    self.sow("intermediates", "attention", y)
    x = x + norm("norm1")(y)
    y = gelu(Dense(cfg.mlp_dim, ("embed", "mlp"), name="fc1", **kinds)(x))
    x = x + norm("norm2")(Dense(cfg.width, ("mlp", "embed"), name="fc2", **kinds)(y))
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    self.sow("intermediates", "block_out", x)
    return x, None


class EvaClip(nn.Module):
  """Images -> features. Sows `patches` [B, n, C] (embedded) and, per layer, `layers/attention` (before its norm) and
  `layers/block_out`, [layers, B, 1 + n, C] with the class token first."""

  cfg: EvaClipConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """The residual stream after the last block, without class token and without a final norm (spec 5.2).

    Args:
      images: [B, S, S, 3], normalised by CLIP's mean and standard deviation. What is left of S beside whole patches is
        not looked at.

    Returns:
      [B, n, C], n = (S / patch)^2, row-major.
    """
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    b, side, p = images.shape[0], cfg.side, cfg.patch_size
    # A convolution whose stride is its size, as a matrix product: patches flattened (row, column, channel).
    x = images[:, : side * p, : side * p]
    x = x.reshape(b, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, side * side, p * p * 3)
    x = Dense(cfg.width, (None, "embed"), name="patch_embed", **kinds)(x)
    self.sow("intermediates", "patches", x)

    table = lambda name, rows: self.param(
      name,
      nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed")),
      (rows, cfg.width),
      self.param_dtype,
    ).astype(self.dtype)
    cls = jnp.broadcast_to(table("cls_token", 1), (b, 1, cfg.width))
    x = jnp.concatenate([cls, x], axis=1) + table("pos_embed", 1 + side * side)
    x, _ = scan_layers(Block, cfg.layers, remat=cfg.remat)(cfg, name="layers", **kinds)(x)
    return x[:, 1:]


def pool(features: jax.Array, stride: int) -> jax.Array:
  """Average over stride x stride squares of the token grid: [B, s^2, C] -> [B, floor(s / stride)^2, C], row-major. Rows
  and columns beyond the last whole square are left out, as torch's pooling does (spec 5.3)."""
  b, n, c = features.shape
  side = math.isqrt(n)
  out = side // stride
  x = features.reshape(b, side, side, c)[:, : out * stride, : out * stride]
  x = x.reshape(b, out, stride, out, stride, c).astype(jnp.float32)
  return jnp.mean(x, axis=(2, 4)).reshape(b, out * out, c).astype(features.dtype)
