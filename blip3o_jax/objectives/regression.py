"""Regression: the query states, projected, shall be the CLIP features themselves: the paper's CLIP + MSE (3.2, 3.3).

  loss = mean of (X - W Q)^2

There is one query for each token of the features. The same prompt gives always the same features, which is what the
paper holds against this design.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.errors import UserError
from blip3o_jax.models import flops
from blip3o_jax.models.flops import Pass
from blip3o_jax.objectives import generation

COMPONENTS = ("backbone", "queries", "projection", "clip")

check = generation.check  # the same pass over the prompt


def passes(cfg, shapes, args):
  """See objectives: those of generation with a projection in the place of the DiT."""
  *before, _ = generation.passes(cfg, shapes, args)
  return [*before, Pass("projection", flops.matmul(cfg.queries, cfg.backbone.dim, cfg.clip.width))]


def loss(params, batch, rng, *, model, cfg):
  """Mean squared error of the projected states. `batch` as of the objective generation; nothing is random."""
  del rng
  return _loss(params, batch, model=model, **cfg)


def _loss(params, batch, *, model, prefix_pass: bool = True):
  call = lambda *args, method, **kwargs: model.apply({"params": params}, *args, method=method, **kwargs)
  x = batch["features"] if "features" in batch else call(batch["pixels"], method="clip_features")
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  prompt = batch["tokens"], batch["token_mask"], batch["positions"]
  states = call(*prompt, prefix_pass=prefix_pass, method="query_states")
  if states.shape[1] != x.shape[1]:
    raise UserError(f"{states.shape[1]} queries for {x.shape[1]} features a picture; regression needs one for each")
  predicted = call(states, method="regress").astype(jnp.float32)
  b = x.shape[0]
  mse = jnp.mean(jnp.square(predicted - x), axis=(1, 2))
  return jnp.sum(mse), jnp.float32(b), {"variance": jnp.mean(jnp.var(x, axis=(0, 1))) * b}
