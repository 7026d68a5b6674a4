"""Joint training: understanding and generation in one batch, the backbone learns from both (paper, 4.1; spec part 8).

  loss = understanding_weight * cross entropy of an answer's token + generation_weight * flow-matching loss of a picture

Each is a mean over its own part of the batch, and they are added, as in the release's Qwen3 branch. With accumulation
these are means over each accumulated part.
"""

import dataclasses

import jax
import jax.numpy as jnp

from blip3o_jax.objectives import generation, understanding

COMPONENTS = generation.COMPONENTS


def passes(cfg, shapes, args):
  """See objectives: of the mean row of a batch, whichever part it belongs to."""
  parts = {
    "understanding": understanding.passes(cfg, shapes["understanding"], {}),
    "generation": generation.passes(cfg, shapes["generation"], {"prefix_pass": False}),
  }
  rows = {name: shapes[name]["tokens"][0] for name in parts}
  share = {name: count / sum(rows.values()) for name, count in rows.items()}
  return [dataclasses.replace(one, flops=one.flops * share[name]) for name, part in parts.items() for one in part]


def loss(params, batch, rng, *, model, cfg):
  """The weighted sum. `batch`: {"understanding": its batch, "generation": its batch}, of any two numbers of rows.

  The whole prompt has gradients, since the backbone trains (no prefix pass).
  """
  return _loss(params, batch, rng, model=model, **cfg)


def _loss(
  params,
  batch,
  rng,
  *,
  model,
  understanding_weight: float = 1.0,
  generation_weight: float = 1.0,
  drop: float = 0.1,
  times: str = "discrete",
  shift: float = 1.0,
):
  drawing = {"drop": drop, "times": times, "shift": shift, "prefix_pass": False}
  parts = {
    "understanding": (understanding, understanding_weight, {}),
    "generation": (generation, generation_weight, drawing),
  }
  rows = jnp.float32(sum(batch[name]["tokens"].shape[0] for name in parts))
  total, metrics = jnp.float32(0), {}
  for name, (objective, weight, cfg) in parts.items():
    part, count, sums = objective.loss(params, batch[name], rng, model=model, cfg=cfg)
    total += weight * part / count
    metrics |= {name: part / count} | {key: value / count for key, value in sums.items()}
  return total * rows, rows, jax.tree.map(lambda x: x * rows, metrics)
