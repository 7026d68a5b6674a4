"""In the place of a model, for the objectives of both decoders: known features and latents, a known output."""

import types

import jax.numpy as jnp
import numpy as np

SIDE, N, C = 6, 4, 3


class Fake:
  """Notes what each method is called with, in `seen`."""

  def __init__(self, rows, latents=(0.0, 1.0), process=None):
    """`latents`: mean and deviation."""
    rng = np.random.default_rng(0)
    self.cfg = types.SimpleNamespace(decoder_process=process)
    self.features = jnp.asarray(rng.normal(size=(rows, N, C)), jnp.float32)
    self.null = jnp.full((1, N, C), 7.0)
    self.latents = jnp.asarray(rng.normal(*latents, (rows, SIDE, SIDE, 4)), jnp.float32)
    self.seen = {}

  def apply(self, variables, *args, method):
    self.seen[method] = args
    if method == "unet_predict":
      return jnp.cos(args[0])
    return {
      "clip_features": self.features,
      "null_clip_features": self.null,
      "picture_latents": self.latents,
    }[method]
