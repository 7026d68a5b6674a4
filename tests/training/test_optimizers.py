"""Schedules against the formulas of transformers, AdamW and clipping against the update written out."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.training import optimizers

COSINE_MIN = {"name": "cosine_min", "min_ratio": 0.1, "warmup_steps": 0, "warmup_ratio": 0.003}


def hf_cosine_with_min_lr(step, warmup, total, min_rate):
  """transformers.optimization._get_cosine_with_min_lr_schedule_with_warmup_lr_lambda, num_cycles 0.5."""
  if step < warmup:
    return step / max(1, warmup)
  progress = (step - warmup) / max(1, total - warmup)
  return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)) * (1 - min_rate) + min_rate)


def test_cosine_min_is_the_release_schedule():
  schedule = optimizers.make_schedule(COSINE_MIN, 1e-4, 10_001)  # warm-up: ceil(0.003 * 10001) = 31
  for step in (0, 1, 30, 31, 32, 5000, 10_000):
    assert float(schedule(step)) == pytest.approx(1e-4 * hf_cosine_with_min_lr(step, 31, 10_001, 0.1), rel=1e-5)
  assert float(schedule(0)) == 0.0


def test_other_schedules():
  cosine = optimizers.make_schedule(COSINE_MIN | {"name": "cosine", "warmup_ratio": 0.0}, 2.0, 100)
  assert [float(cosine(s)) for s in (0, 50)] == pytest.approx([2.0, 1.0], rel=1e-6)
  assert float(cosine(100)) == pytest.approx(0.0, abs=1e-6)
  constant = optimizers.make_schedule(COSINE_MIN | {"name": "constant", "warmup_steps": 4}, 2.0, 100)
  assert [float(constant(s)) for s in (0, 1, 4, 99)] == pytest.approx([0.0, 0.5, 2.0, 2.0])
  with pytest.raises(UserError, match="linear"):
    optimizers.make_schedule(COSINE_MIN | {"name": "linear"}, 1.0, 10)


def test_adamw_against_the_formula():
  cfg = {"name": "adamw", "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
  optimizer = optimizers.make_optimizer(cfg)
  params = {"a": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}}
  grads = {"a": {"kernel": jnp.array([0.5, 0.25]), "bias": jnp.array([2.0])}}
  state = optimizer.init(params)
  for _ in range(2):
    updates, state = optimizer.update(grads, state, params)
  # A constant gradient: both bias-corrected moments are exact, so the step is g / (|g| + eps) + decay * p.
  np.testing.assert_allclose(updates["a"]["kernel"], [1.0 + 0.1, 1.0 - 0.2], rtol=1e-4)
  np.testing.assert_allclose(updates["a"]["bias"], [1.0], rtol=1e-4)  # biases do not decay


def test_clipping():
  grads = {"a": jnp.array([3.0, 4.0])}
  np.testing.assert_allclose(optimizers.clip_by_norm(grads, jnp.float32(5.0), 1.0)["a"], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(optimizers.clip_by_norm(grads, jnp.float32(5.0), 10.0)["a"], [3.0, 4.0])
  np.testing.assert_allclose(optimizers.clip_by_norm(grads, jnp.float32(5.0), 0.0)["a"], [3.0, 4.0])


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adam():
  """The same numbers for sharded trees, whose leaves are boxed, is what the trainer relies on."""
  kinds = {"name": "muon", "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
  optimizer = optimizers.make_optimizer(kinds)
  rng = np.random.default_rng(0)
  params = {
    "layers": {"q": {"kernel": rng.normal(size=(3, 8, 16)), "bias": rng.normal(size=(3, 16))}},
    "out": {"kernel": rng.normal(size=(8, 4))},
    "conv": {"kernel": rng.normal(size=(3, 3, 2, 4))},
  }
  grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
  convolution = updates["conv"]["kernel"].reshape(18, 4)
  for matrix in (*updates["layers"]["q"]["kernel"], updates["out"]["kernel"], convolution):
    values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
    assert values.max() / values.min() < 2  # of a random matrix of these sizes it is above 4
    assert np.sqrt(np.mean(np.square(matrix))) == pytest.approx(0.2, rel=0.2)
  assert np.vdot(updates["out"]["kernel"], grads["out"]["kernel"]) > 0  # the trainer subtracts
  assert np.allclose(np.abs(updates["layers"]["q"]["bias"]), np.abs(updates["layers"]["q"]["bias"]).flat[0], rtol=1e-3)

  boxed = jax.tree.map(lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim), grads)
  plain, inside = jax.eval_shape(optimizer.init, grads), nn.unbox(jax.eval_shape(optimizer.init, boxed))
  assert len(jax.tree.leaves(plain)) == len(jax.tree.leaves(inside))
  with pytest.raises(UserError, match="'sgd' is unknown"):
    optimizers.make_optimizer(kinds | {"name": "sgd"})
