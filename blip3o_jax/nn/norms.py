"""Normalisation layers. Statistics are always taken in float32."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
  """x * rsqrt(mean(x^2) + eps), cast to `dtype`, then times the learned weight: [..., D] -> [..., D].

  The order of the casts is that of the release (spec 2.3 and transformers' Qwen2RMSNorm). `use_bias` adds a learned
  bias at the end (the DC-AE's norms).
  """

  eps: float = 1e-6
  use_bias: bool = False
  axis: str | None = "norm"
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  scale_init: Any = nn.initializers.ones_init()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param(
      "scale", nn.with_logical_partitioning(self.scale_init, (self.axis,)), x.shape[-1:], self.param_dtype
    )
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    x = x.astype(self.dtype) * scale.astype(self.dtype)
    if self.use_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (self.axis,))
      x = x + self.param("bias", init, x.shape[-1:], self.param_dtype).astype(self.dtype)
    return x


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(var + eps), then scale and bias unless `affine` is off: [..., D] -> [..., D]."""

  eps: float = 1e-5
  affine: bool = True
  axis: str | None = "norm"
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  scale_init: Any = nn.initializers.ones_init()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(var + self.eps)
    if self.affine:
      part = lambda init: nn.with_logical_partitioning(init, (self.axis,))
      x = x * self.param("scale", part(self.scale_init), x.shape[-1:], self.param_dtype).astype(jnp.float32)
      x = x + self.param("bias", part(nn.initializers.zeros_init()), x.shape[-1:], self.param_dtype).astype(jnp.float32)
    return x.astype(self.dtype)


class GroupNorm(nn.Module):
  """Group normalisation over (H, W, C / groups) of NHWC, affine: [B, H, W, C] -> [B, H, W, C]."""

  groups: int = 32
  eps: float = 1e-5
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, *_, c = x.shape
    # Sums run over pixels first, channel by channel, and only then over the channels of a group: the same statistics,
    # several times faster on a CPU than one reduction over both.
    rows = x.astype(jnp.float32).reshape(b, -1, c)
    spread = lambda per_channel: jnp.repeat(
      jnp.mean(per_channel.reshape(b, self.groups, -1), axis=-1), c // self.groups, axis=-1
    )[:, None]
    rows = rows - spread(jnp.mean(rows, axis=1))
    inverse = jax.lax.rsqrt(spread(jnp.mean(jnp.square(rows), axis=1)) + self.eps)
    part = lambda init: nn.with_logical_partitioning(init, ("norm",))
    scale = self.param("scale", part(nn.initializers.ones_init()), (c,), self.param_dtype).astype(jnp.float32)
    bias = self.param("bias", part(nn.initializers.zeros_init()), (c,), self.param_dtype).astype(jnp.float32)
    return (rows * (inverse * scale) + bias).reshape(x.shape).astype(self.dtype)
