"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def guide(null: jax.Array, cond: jax.Array, scale: float) -> jax.Array:
  """null + scale (cond - null): scale 1 is the conditional prediction, 0 the unconditional one."""
  return null + scale * (cond - null)


def null_first(condition: jax.Array) -> jax.Array:
  """[B, L, E] -> [2B, L, E], all-zero conditions and then the rows: the batch of the flow sampler (spec 3.3)."""
  return jnp.concatenate([jnp.zeros_like(condition), condition])


def guided_call(fn: Callable[..., jax.Array], scale: float | None, *, null: int) -> Callable[..., jax.Array]:
  """Both branches in one batch: (x [B, ...], t, guided=None) -> float32 [B, ...].

  Args:
    fn: (x [2B, ...], t) -> prediction [2B, ...]; half `null` (0 or 1) of the batch is to be unconditioned.
    scale: a Python number, since it decides the shape of the batch; None: the conditioned branch alone, [B, ...].

  `guided` is a traced bool, None for always; where it is False the conditioned branch runs alone, on a batch [B, ...]:
  outside the interval of a limited guidance (Kynkaanniemi et al. 2024, arXiv 2404.07724).
  """

  def plain(x, t):
    return fn(x, t).astype(jnp.float32)

  def doubled(x, t):
    halves = jnp.split(plain(jnp.concatenate([x, x]), t), 2)
    return guide(halves[null], halves[1 - null], scale)

  def call(x, t, guided=None):
    if scale is None or guided is None:
      return plain(x, t) if scale is None else doubled(x, t)
    return jax.lax.cond(guided, doubled, plain, x, t)

  return call


def guided_velocity(velocity_fn: Callable[[jax.Array, jax.Array], jax.Array], scale: float) -> Callable[..., jax.Array]:
  """`guided_call` of the flow samplers: the unconditioned half comes first, t is float32 [2B] for `velocity_fn`, and a
  scale of exactly 1 leaves the unconditioned half out."""
  call = lambda x, t: velocity_fn(x, jnp.broadcast_to(t, x.shape[:1]))
  return guided_call(call, None if scale == 1 else scale, null=0)


def guided_steps(levels: np.ndarray, interval: tuple[float, float]) -> np.ndarray | None:
  """bool [steps]: which steps, at noise levels 0..1, lie in the interval, both ends in; None: all that there can be."""
  low, high = interval
  return None if low <= 0 and high >= 1 else (levels >= low) & (levels <= high)
