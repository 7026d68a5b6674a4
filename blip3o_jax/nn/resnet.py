"""The residual convolution block and the resampling layers that the VAE and the UNet share (diffusers' ResnetBlock2D,
Downsample2D, Upsample2D). All NHWC."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.linear import Conv, Dense, UpsampleConv
from blip3o_jax.nn.norms import GroupNorm


class ResnetBlock(nn.Module):
  """norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut: x [B, H, W, C], time [B, E] or None -> [B, H, W, features].

  The shortcut is a 1x1 convolution where the width changes, else the identity.
  """

  features: int
  groups: int = 32
  eps: float = 1e-6
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    norm = lambda name: GroupNorm(self.groups, self.eps, **types, name=name)
    h = Conv(self.features, **types, name="conv1")(nn.silu(norm("norm1")(x)))
    if time is not None:
      h = h + Dense(self.features, ("time", "conv_out"), **types, name="time_emb_proj")(nn.silu(time))[:, None, None]
    h = Conv(self.features, **types, name="conv2")(nn.silu(norm("norm2")(h)))
    if x.shape[-1] != self.features:
      x = Conv(self.features, 1, padding=0, **types, name="conv_shortcut")(x)
    return x + h


class Downsample(nn.Module):
  """A stride-2 3x3 convolution: [B, H, W, C] -> [B, H / 2, W / 2, C].

  `padding` is 1 in the UNet; the VAE pads only below and to the right, ((0, 1), (0, 1)).
  """

  padding: Any = 1
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return Conv(x.shape[-1], stride=2, padding=self.padding, **types, name="conv")(x)


class Upsample(nn.Module):
  """Nearest neighbour by 2, or to `size`, then a 3x3 convolution: [B, H, W, C] -> [B, 2H, 2W, C]."""

  size: tuple[int, int] | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return UpsampleConv(x.shape[-1], size=self.size, **types, name="conv")(x)
