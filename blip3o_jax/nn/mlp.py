"""Feed-forward layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.linear import Dense, default_init


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
    return Dense(x.shape[-1], ("mlp", "embed"), name="down", **kinds)(nn.silu(gate) * up)
