"""Feed-forward layers."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.linear import Dense, DepthwiseConv, default_init


def gelu(x: jax.Array, *, approximate: bool = False) -> jax.Array:
  """x times the normal distribution function, or its approximation by tanh; computed in float32 and rounded once, as
  torch's is.

  By erf, as torch: by erfc, as `nn.gelu`, the far negative tail is more exact, but it takes 2.2 times as long on a CPU,
  and a TPU's compiler writes the comparisons within erfc out to memory.
  """
  y = x.astype(jnp.float32)
  y = nn.gelu(y, approximate=True) if approximate else 0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))
  return y.astype(x.dtype)


class SwiGLU(nn.Module):
  """down(silu(gate(x)) * up(x)): [..., D] -> [..., D] through `hidden` channels (Shazeer 2020; Llama, Qwen)."""

  hidden: int
  use_bias: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  kernel_init: Any = default_init

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kinds = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
    kinds["kernel_init"] = self.kernel_init
    gate = Dense(self.hidden, ("embed", "mlp"), name="gate", **kinds)(x)
    up = Dense(self.hidden, ("embed", "mlp"), name="up", **kinds)(x)
    gate = nn.silu(gate.astype(jnp.float32)).astype(gate.dtype)  # rounded once, as torch's
    return Dense(x.shape[-1], ("mlp", "embed"), name="down", **kinds)(gate * up)


class GLUMBConv(nn.Module):
  """The gated inverted bottleneck of Sana and the DC-AE: [B, H, W, D] -> [B, H, W, D] through `hidden` channels.

  Widen to 2 * hidden, SiLU, depthwise 3x3, then x * silu(gate) of its halves, and narrow without a bias (Xie et al.
  2024, arXiv 2410.10629; diffusers' GLUMBConv, without its residual and its norm).
  """

  hidden: int
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = nn.silu(Dense(2 * self.hidden, ("embed", "mlp"), name="widen", **kinds)(x))
    y, gate = jnp.split(DepthwiseConv(name="depthwise", **kinds)(y), 2, axis=-1)
    return Dense(x.shape[-1], ("mlp", "embed"), use_bias=False, name="narrow", **kinds)(y * nn.silu(gate))
