"""Decoding latents tile by tile, where a whole picture does not fit into memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import UserError


def decode_tiled(decode: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int) -> jax.Array:
  """`decode` of latents [B, h, w, C] -> [B, s h, s w, 3], one tile of side `tile` after another, blended where they
  overlap, which is a quarter of a tile or more.

  Not the same picture to the bit: norms and attention of the decoder see a tile. With a tile of the whole
  picture's size nothing changes.

  Raises:
    UserError: a tile of less than 4 latents.
  """
  if tile < 4:
    raise UserError(f"decoder_tile is {tile}; take 0 for the whole picture, or at least 4 latents")
  height, width = latents.shape[1:3]
  if tile >= max(height, width):
    return decode(latents)
  corners = [(y, x) for y in _starts(height, tile) for x in _starts(width, tile)]
  tiles = jnp.stack([latents[:, y : y + tile, x : x + tile] for y, x in corners])
  pieces = jax.lax.map(decode, tiles)
  scale = pieces.shape[2] // min(tile, height)
  weight = jnp.asarray(np.outer(_ramp(pieces.shape[2]), _ramp(pieces.shape[3]))[:, :, None], pieces.dtype)
  total = jnp.zeros((latents.shape[0], scale * height, scale * width, pieces.shape[-1]), pieces.dtype)
  share = jnp.zeros((*total.shape[1:3], 1), pieces.dtype)
  for (y, x), piece in zip(corners, pieces, strict=True):
    place = np.s_[scale * y : scale * y + piece.shape[1], scale * x : scale * x + piece.shape[2]]
    total = total.at[:, *place].add(weight * piece)
    share = share.at[place].add(weight)
  return total / share


def _starts(size: int, tile: int) -> list[int]:
  """Evenly spread, the last ending with the picture, at least a quarter of a tile in common."""
  count = max(1, -(-(size - tile) // (tile - tile // 4)) + 1)
  return [round(i * (size - tile) / max(count - 1, 1)) for i in range(count)] if size > tile else [0]


def _ramp(size: int) -> np.ndarray:
  """Weights that fall towards the ends of a tile, above 0 everywhere."""
  return np.minimum(np.arange(size) + 1, np.arange(size)[::-1] + 1) / size
