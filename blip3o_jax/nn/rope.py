"""Rotary positions. A table is an array of phases [..., K / 2] in float32, built from
(axis of channel, frequency of channel, position); the layers only take its cosine and sine."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def interleaved_channels(axes: int, head_size: int, theta: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
  """Channel k belongs to axis k mod n and has frequency theta^(-2 n j / K), j = k // n (spec 2.5, 2.6).

  Two axes give the release's table. Channels that do not fill a group of n are left unrotated (frequency 0).

  Returns:
    (axis of channel, frequency of channel), int [K / 2] and float64 [K / 2].
  """
  half = head_size // 2
  channel = np.arange(half)
  frequency = theta ** (-2.0 * axes * (channel // axes) / head_size)
  frequency[(half // axes) * axes :] = 0.0
  return channel % axes, frequency


def concatenated_channels(split: Sequence[int], theta: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
  """Axis a takes split[a] real channels, frequencies theta^(-2 j / split[a]) (Lumina-Image-2; spec 2.6)."""
  axis = np.concatenate([np.full(d // 2, a) for a, d in enumerate(split)])
  frequency = np.concatenate([theta ** (-2.0 * np.arange(d // 2) / d) for d in split])
  return axis, frequency


def phases(positions: jax.Array, axis: np.ndarray, frequency: np.ndarray) -> jax.Array:
  """positions [..., n axes] -> phases float32 [..., K / 2]."""
  return positions.astype(jnp.float32)[..., axis] * jnp.asarray(frequency, jnp.float32)


def rotate_pairs(x: jax.Array, phase: jax.Array) -> jax.Array:
  """Rotate adjacent channel pairs (2k, 2k+1) by phase[k] (Lumina; complex multiplication).

  x: [B, L, H, K]; phase: [B or 1, L, K / 2]. float32 inside, dtype of x outside.
  """
  cos, sin = jnp.cos(phase)[:, :, None], jnp.sin(phase)[:, :, None]
  a, b = x.astype(jnp.float32)[..., 0::2], x.astype(jnp.float32)[..., 1::2]
  return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def rotate_halves(x: jax.Array, phase: jax.Array) -> jax.Array:
  """Rotate channel pairs (k, k + K/2) by phase[k] (Llama, Qwen: `rotate_half`).

  x: [B, L, H, K]; phase: [B or 1, L, K / 2]. float32 inside, dtype of x outside.
  """
  cos, sin = jnp.cos(phase)[:, :, None], jnp.sin(phase)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
