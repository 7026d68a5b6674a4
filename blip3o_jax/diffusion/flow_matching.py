"""Flow matching along straight lines from data to noise (spec 3.1, 3.2; Liu et al. 2022, arXiv 2209.03003).

  x_sigma = (1 - sigma) x1 + sigma noise,    v = d x / d sigma = noise - x1,    the network's time is 1000 sigma

The paper writes t = 1 - sigma, so its velocity has the opposite sign (spec part 14).
"""

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import UserError


def shift_sigma(sigma, shift: float):
  """shift sigma / (1 + (shift - 1) sigma): more high noise for shift > 1; 1, as in the release, changes nothing."""
  return shift * sigma / (1 + (shift - 1) * sigma)


def times_table(n: int = 1000, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
  """The scheduler's training grid: (sigmas, times = n sigmas), float32 [n] each, noisiest first: 1, 1 - 1/n, ..., 1/n.

  Computed as the reference computes it, so a few times are one float32 step off a whole number (507.00003).
  """
  sigmas = shift_sigma(np.linspace(1, n, n, dtype=np.float32)[::-1] / np.float32(n), np.float32(shift))
  return sigmas, sigmas * np.float32(n)


def times_at(u: jax.Array, *, mode: str = "discrete", n: int = 1000, shift: float = 1.0) -> tuple[jax.Array, jax.Array]:
  """Noise levels of uniform numbers u [B] in [0, 1): (sigma, t = n sigma), float32 [B] each.

  "discrete" takes entry floor(n u) of `times_table`, as the release does; "continuous" (the paper) sigma = 1 - u.
  """
  if mode == "discrete":
    sigmas, times = times_table(n, shift)
    index = jnp.floor(u * n).astype(jnp.int32)
    return jnp.asarray(sigmas)[index], jnp.asarray(times)[index]
  if mode == "continuous":
    sigma = shift_sigma(1 - u.astype(jnp.float32), shift)
    return sigma, sigma * n
  raise UserError(f"flow matching: times {mode!r} are neither 'discrete' nor 'continuous'")


def sample_times(rng: jax.Array, batch: int, *, mode: str = "discrete", shift: float = 1.0):
  """`times_at` of uniform random numbers: (sigma, t), float32 [batch] each, sigma in (0, 1]."""
  return times_at(jax.random.uniform(rng, (batch,)), mode=mode, shift=shift)


def interpolate(x1: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
  """(1 - sigma) x1 + sigma noise: x1, noise [B, ...], sigma [B] -> [B, ...] in the dtype of x1.

  The mixing is float32. The release rounds sigma to the latents' bfloat16 first, an error of up to 0.002 (spec 3.2).
  """
  sigma = sigma.astype(jnp.float32).reshape(-1, *(1,) * (x1.ndim - 1))
  return ((1 - sigma) * x1.astype(jnp.float32) + sigma * noise.astype(jnp.float32)).astype(x1.dtype)


def target(x1: jax.Array, noise: jax.Array) -> jax.Array:
  """The velocity noise - x1, the same at every sigma."""
  return noise - x1


def drop_condition(rng: jax.Array, condition: jax.Array, p: float) -> jax.Array:
  """Zero the whole condition [B, ...] of a sample with probability p, the others as they are (spec 3.2, item 5)."""
  keep = jax.random.bernoulli(rng, 1 - p, (condition.shape[0], *(1,) * (condition.ndim - 1)))
  return jnp.where(keep, condition, jnp.zeros((), condition.dtype))
