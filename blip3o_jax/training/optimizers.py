"""AdamW (Muon as an option) and the learning-rate schedules of the paper, from config (spec 11.1)."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from blip3o_jax.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]

# torch's trainers leave biases and norms out of weight decay, so do we.
_NO_DECAY = re.compile(r"(^|/)(bias|scale)$")


def make_schedule(cfg: Mapping[str, Any], learning_rate: float, steps: int) -> Schedule:
  """step (0-based) -> learning rate.

  Linear warm-up from 0 over `warmup_steps`, or ceil(`warmup_ratio` * steps), then with progress p in 0..1
    cosine_min   min_ratio + (1 - min_ratio) * 0.5 (1 + cos(pi p))   (transformers' cosine_with_min_lr)
    cosine       the same with min_ratio = 0
    constant     1

  Raises:
    UserError: unknown name.
  """
  name, min_ratio = cfg["name"], float(cfg["min_ratio"])
  if name not in ("cosine_min", "cosine", "constant"):
    raise UserError(f"schedule.name {name!r} is unknown; choose cosine_min, cosine or constant")
  if name == "cosine":
    min_ratio = 0.0
  warmup = int(cfg["warmup_steps"]) or math.ceil(steps * float(cfg["warmup_ratio"]))

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
    factor = min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    if name == "constant":
      factor = jnp.ones_like(factor)
    return learning_rate * jnp.where(step < warmup, step / max(1, warmup), factor)

  return schedule


def make_optimizer(cfg: Mapping[str, Any]) -> optax.GradientTransformation:
  """Everything of AdamW but the learning rate: the step multiplies by -lr itself, from its own step number.

  (So the schedule goes on over a skipped update, as torch's does, and the rate that is logged is the rate used.)
  Muon is optax's: what is no kernel goes to Adam with Nesterov's momentum, and there no weight decays.

  Raises:
    UserError: unknown optimizer.
  """
  if cfg["name"] not in ("adamw", "muon"):
    raise UserError(f"optimizer.name {cfg['name']!r} is unknown; choose adamw or muon")
  if cfg["name"] == "muon":
    # The rate -1 undoes optax's own sign; updates have AdamW's size (0.2), so a rate suits both (Liu et al. 2025, 2.2).
    return optax.contrib.muon(
      -1.0,
      consistent_rms=0.2,
      weight_decay=float(cfg["weight_decay"]),
      weight_decay_mask=decay_mask,
      adam_b1=float(cfg["b1"]),
      adam_b2=float(cfg["b2"]),
      eps=float(cfg["eps"]),
      muon_weight_dimension_numbers=matrix_axes,
    )
  adam = optax.scale_by_adam(b1=float(cfg["b1"]), b2=float(cfg["b2"]), eps=float(cfg["eps"]))
  if not cfg["weight_decay"]:
    return adam
  return optax.chain(adam, optax.add_decayed_weights(float(cfg["weight_decay"]), mask=decay_mask))


def matrix_axes(params: Any) -> Any:
  """For Muon, the axes of a leaf that are (in, out) of a matrix; None, which is Adam, for all but kernels.

  The window of a convolution counts as `in`: it multiplies the flattened patch.
  """

  def axes(path, x):
    names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]  # without the box of a sharded leaf
    stacked = int("layers" in names)
    if names[-1] != "kernel" or x.ndim - stacked not in (2, 4):
      return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(stacked, x.ndim - 1)), x.ndim - 1)

  return jax.tree_util.tree_map_with_path(axes, params)


def decay_mask(params: Any) -> Any:
  """True where weight decay applies: everything but leaves called bias or scale."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _NO_DECAY.search("/".join(str(getattr(k, "key", k)) for k in path)) is None, params
  )


def clip_by_norm(grads: Any, norm: jax.Array, limit: float) -> Any:
  """Scale by min(1, limit / (norm + 1e-6)), torch's clip_grad_norm_; `limit` 0 leaves them as they are."""
  if not limit:
    return grads
  scale = jnp.minimum(1.0, limit / (norm + 1e-6))
  return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
