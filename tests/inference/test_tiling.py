"""Tiles: a decoder that looks at one latent alone gives the whole picture back, whatever the tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.inference import tiling


def decode(latents):
  """Each latent becomes a square of 2 x 2 pixels."""
  return jnp.repeat(jnp.repeat(jnp.sin(latents[..., :3]), 2, axis=1), 2, axis=2)


@pytest.mark.parametrize(("height", "width", "tile"), [(16, 16, 8), (16, 12, 6), (9, 20, 8), (6, 16, 8), (17, 5, 4)])
def test_tiles_make_the_whole(height, width, tile):
  latents = np.random.default_rng(0).normal(size=(2, height, width, 4)).astype(np.float32)
  seen = []

  def watched(x):
    seen.append(x.shape)
    return decode(x)

  out = tiling.decode_tiled(watched, latents, tile)
  np.testing.assert_allclose(out, decode(latents), atol=1e-5)
  assert seen[0] == (2, min(tile, height), min(tile, width), 4)


def test_overlap_and_blending():
  """Neighbours share a quarter of a tile; where they disagree the picture goes from one to the other without a step."""
  for size in range(9, 60):
    starts = tiling._starts(size, 8)
    assert starts[0] == 0 and starts[-1] == size - 8 and np.diff(starts).max() <= 6
  numbered = lambda tile: jnp.broadcast_to(jnp.mean(tile), (*tile.shape[:3], 3))
  latents = jnp.broadcast_to(jnp.arange(16.0)[None, None, :, None], (1, 8, 16, 4))
  row = np.asarray(tiling.decode_tiled(numbered, latents, 8))[0, 4, :, 0]
  assert row[0] == 3.5 and row[-1] == 11.5 and (np.diff(row) >= 0).all() and np.diff(row).max() < 4


def test_a_tile_of_the_whole_changes_nothing():
  latents = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
  np.testing.assert_array_equal(tiling.decode_tiled(decode, latents, 4), decode(latents))
  with pytest.raises(UserError, match="decoder_tile is 3"):
    tiling.decode_tiled(decode, latents, 3)
