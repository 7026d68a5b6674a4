"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def guide(null: jax.Array, cond: jax.Array, scale: float) -> jax.Array:
  """null + scale (cond - null): scale 1 is the conditional prediction, 0 the unconditional one."""
  return null + scale * (cond - null)


def null_first(condition: jax.Array) -> jax.Array:
  """[B, L, E] -> [2B, L, E], all-zero conditions and then the rows: the batch of the flow sampler (spec 3.3)."""
  return jnp.concatenate([jnp.zeros_like(condition), condition])


def guided_velocity(
  velocity_fn: Callable[[jax.Array, jax.Array], jax.Array], scale: float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The guided velocity of the flow samplers: (x [B, ...], t float32 scalar) -> float32 [B, ...].

  Args:
    velocity_fn: (x [2B, ...], t float32 [2B]) -> velocity [2B, ...]; the first half of the batch is to be
      unconditioned, the second conditioned. With scale 1 the batch is [B, ...], conditioned.
    scale: a Python number, since it decides the shape of the batch.
  """

  def velocity(x, t):
    doubled = x if scale == 1 else jnp.concatenate([x, x])
    v = velocity_fn(doubled, jnp.broadcast_to(t, doubled.shape[:1])).astype(jnp.float32)
    return v if scale == 1 else guide(*jnp.split(v, 2), scale)

  return velocity
