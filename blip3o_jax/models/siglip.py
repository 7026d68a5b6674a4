"""The SigLIP vision tower (SigLIP2-so400m/16 at 512 pixels): the Sana decoder draws from its features, and the Qwen3
branch understands with them (transformers' SiglipVisionModel; spec parts 7.1 and 8)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import require_plain
from blip3o_jax.nn.attention import attention
from blip3o_jax.nn.linear import Dense
from blip3o_jax.nn.mlp import gelu
from blip3o_jax.nn.norms import LayerNorm
from blip3o_jax.nn.stack import scan_layers


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
  """The tower; `head` is the attention pooling to one vector, which nothing in this family reads.

  pool_stride: side of the squares of tokens that are averaged where the tower's features are to be drawn (spec 7.1).
  """

  image_size: int
  patch_size: int
  width: int
  layers: int
  heads: int
  mlp_dim: int
  norm_eps: float = 1e-6
  head: bool = True
  pool_stride: int = 1
  remat: str = "none"

  @property
  def side(self) -> int:
    """Patches along one side of the image."""
    return self.image_size // self.patch_size

  @classmethod
  def from_reference(
    cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
  ) -> "SiglipConfig":
    """From the reference's config.json, of the tower or of a whole SigLIP.

    Weights without the pooling head (see `shapes`) give a tower without it, whatever the config says.

    Raises:
      UserError: another activation, or other than three colours.
    """
    silent = {  # what an entry is where the file is silent (transformers' SiglipVisionConfig)
      "hidden_size": 768,
      "intermediate_size": 3072,
      "num_hidden_layers": 12,
      "num_attention_heads": 12,
      "image_size": 224,
      "patch_size": 16,
      "layer_norm_eps": 1e-6,
      "vision_use_head": True,
    }
    config = silent | dict(config.get("vision_config") or config)
    require_plain("SigLIP config.json", config, {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3})
    return cls(
      image_size=config["image_size"],
      patch_size=config["patch_size"],
      width=config["hidden_size"],
      layers=config["num_hidden_layers"],
      heads=config["num_attention_heads"],
      mlp_dim=config["intermediate_size"],
      norm_eps=config["layer_norm_eps"],
      head=config["vision_use_head"] and (shapes is None or any(key.endswith("head.probe") for key in shapes)),
    )

  def to_reference(self) -> dict[str, Any]:
    """config.json of SiglipVisionModel."""
    return {
      "model_type": "siglip_vision_model",
      "image_size": self.image_size,
      "patch_size": self.patch_size,
      "num_channels": 3,
      "hidden_size": self.width,
      "num_hidden_layers": self.layers,
      "num_attention_heads": self.heads,
      "intermediate_size": self.mlp_dim,
      "hidden_act": "gelu_pytorch_tanh",
      "layer_norm_eps": self.norm_eps,
      "vision_use_head": self.head,
    }


class SiglipOutput(NamedTuple):
  """What the tower gives of B images with n = (image_size / patch_size)^2 patches, row-major.

  penultimate [B, n, D]: the output of the last layer but one, without any norm: the features of the Sana path.
  last_hidden_state [B, n, D]: the output of the last layer after the final norm: those of the understanding path.
  pooled [B, D]: the head's vector, None without a head.
  """

  penultimate: jax.Array
  last_hidden_state: jax.Array
  pooled: jax.Array | None


class _Layers(nn.Module):
  """The factories of the layers that the blocks and the pooling head share."""

  cfg: SiglipConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @property
  def kinds(self) -> dict:
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}

  def norm(self, x: jax.Array, name: str) -> jax.Array:
    return LayerNorm(self.cfg.norm_eps, name=name, **self.kinds)(x)

  def attend(self, x: jax.Array, source: jax.Array) -> jax.Array:
    """x [B, L, D] reads source [B, S, D] -> [B, L, D]."""
    heads = lambda z, name: Dense(self.cfg.width, ("embed", "heads"), name=name, **self.kinds)(z).reshape(
      *z.shape[:2], self.cfg.heads, -1
    )
    y = attention(heads(x, "q"), heads(source, "k"), heads(source, "v")).reshape(x.shape)
    return Dense(self.cfg.width, ("heads", "embed"), name="out", **self.kinds)(y)

  def mlp(self, x: jax.Array) -> jax.Array:
    y = gelu(Dense(self.cfg.mlp_dim, ("embed", "mlp"), name="fc1", **self.kinds)(x), approximate=True)
    return Dense(self.cfg.width, ("mlp", "embed"), name="fc2", **self.kinds)(y)


class Block(_Layers):
  """x + attention(LN(x)), then x + MLP(LN(x)): (x, _) -> ((x', x), None), so that the last but one output survives."""

  @nn.compact
  def __call__(self, carry: tuple[jax.Array, jax.Array]):
    before, _ = carry
    y = self.norm(before, "norm1")
    x = nn.with_logical_constraint(before + self.attend(y, y), ("batch", "length", "act_embed"))
    x = x + self.mlp(self.norm(x, "norm2"))
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    self.sow("intermediates", "block_out", x)
    return (x, before), None


class PoolingHead(_Layers):
  """A learned query reads all tokens: [B, n, D] -> [B, D]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
    probe = self.param("probe", init, (self.cfg.width,), self.param_dtype).astype(self.dtype)
    y = self.attend(jnp.broadcast_to(probe, (x.shape[0], 1, self.cfg.width)), x)
    return (y + self.mlp(self.norm(y, "norm")))[:, 0]


class Siglip(nn.Module):
  """Images -> features. Sows `embeddings` [B, n, D] and, per layer, `layers/block_out` [layers, B, n, D]."""

  cfg: SiglipConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> SiglipOutput:
    """images [B, S, S, 3], (x - 0.5) / 0.5 of colours in 0..1 -> SiglipOutput."""
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    b, side, p = images.shape[0], cfg.side, cfg.patch_size
    # A convolution whose stride is its size, as a matrix product: patches flattened (row, column, channel). Pixels
    # beyond the last whole patch are left out, as a convolution does.
    x = images[:, : side * p, : side * p].reshape(b, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5)
    x = Dense(cfg.width, (None, "embed"), name="patch_embed", **kinds)(x.reshape(b, side * side, p * p * 3))
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
    x = x + self.param("pos_embed", init, (side * side, cfg.width), self.param_dtype).astype(self.dtype)
    self.sow("intermediates", "embeddings", x)

    (x, penultimate), _ = scan_layers(Block, cfg.layers, remat=cfg.remat)(cfg, name="layers", **kinds)((x, x))
    x = LayerNorm(cfg.norm_eps, name="norm", **kinds)(x)
    return SiglipOutput(penultimate, x, PoolingHead(cfg, name="head", **kinds)(x) if cfg.head else None)


def normalize(pixels: jax.Array) -> jax.Array:
  """uint8 [..., 3] -> float32 (x - 0.5) / 0.5 of colours in 0..1: what the tower sees."""
  return pixels.astype(jnp.float32) / 127.5 - 1.0


def adaptive_pool(features: jax.Array, side: int) -> jax.Array:
  """Average a square grid of tokens to side x side: [B, n, D] -> [B, side^2, D], row-major (spec 7.1: 32 to 8).

  Cell i averages rows floor(i n / side) up to ceil((i + 1) n / side), so cells overlap where side does not divide the
  grid (torch's adaptive_avg_pool2d). Means are float32.
  """
  b, n, d = features.shape
  full = math.isqrt(n)
  i, row = np.arange(side)[:, None], np.arange(full)[None]
  inside = ((row + 1) * side > i * full) & (row * side < (i + 1) * full)
  weights = jnp.asarray(inside / inside.sum(axis=1, keepdims=True), jnp.float32)
  x = features.reshape(b, full, full, d).astype(jnp.float32)
  x = jnp.einsum("ir,jc,brcd->bijd", weights, weights, x)
  return x.reshape(b, side * side, d).astype(features.dtype)
