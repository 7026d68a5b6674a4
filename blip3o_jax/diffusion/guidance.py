"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

import jax
import jax.numpy as jnp


def guide(null: jax.Array, cond: jax.Array, scale: float) -> jax.Array:
  """null + scale (cond - null): scale 1 is the conditional prediction, 0 the unconditional one."""
  return null + scale * (cond - null)


def null_first(condition: jax.Array) -> jax.Array:
  """[B, L, E] -> [2B, L, E], all-zero conditions and then the rows: the batch of the flow sampler (spec 3.3)."""
  return jnp.concatenate([jnp.zeros_like(condition), condition])
