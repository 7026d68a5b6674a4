"""Fixed sinusoidal embeddings."""

import jax
import jax.numpy as jnp
import numpy as np


def timestep_features(t: jax.Array, size: int) -> jax.Array:
  """Sinusoids of a scalar, cosines first: t [...] -> float32 [..., size] (spec 2.2)."""
  half = size // 2
  # The exponent is rounded to float32 as in the reference, its exponential is exact: times reach 1000, so an error of
  # one unit in the last place would show.
  exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
  omega = np.exp(exponent.astype(np.float64)).astype(np.float32)
  angle = t.astype(jnp.float32)[..., None] * omega
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def grid_code(height: int, width: int, size: int) -> np.ndarray:
  """A smooth 2-D position code for a grid: float32 [height * width, size], row-major, unit variance per entry.

  Half of the channels code the row, half the column of a cell's middle, in eighths of the picture whatever the grid, so
  that a coarse cell resembles the fine ones inside it; frequencies pi/16 * (1, 2, ...), so neighbours are similar.
  """
  quarter = size // 4
  omega = np.pi / 16 * np.arange(1, quarter + 1)
  middles = lambda n: (np.arange(n) + 0.5) * 8 / n
  row, col = np.meshgrid(middles(height), middles(width), indexing="ij")
  parts = [f(p.reshape(-1, 1) * omega) for p in (row, col) for f in (np.sin, np.cos)]
  code = np.concatenate(parts, axis=-1) * np.sqrt(2.0)
  return np.pad(code, ((0, 0), (0, size - code.shape[1]))).astype(np.float32)
