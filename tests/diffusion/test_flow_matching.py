"""Flow matching against the recorded training batch of the reference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.diffusion import flow_matching
from blip3o_jax.errors import UserError
from blip3o_jax.models.next_dit import NextDiT, NextDiTConfig
from blip3o_jax.porting import convert
from blip3o_jax.porting.rules import next_dit as rules

nhwc = lambda x: x.transpose(0, 2, 3, 1)


def test_table_is_the_schedulers():
  io = load_golden("flow").io
  sigmas, times = flow_matching.times_table()
  assert np.array_equal(sigmas, io["train_sigmas"])
  assert np.allclose(times, io["train_timesteps"], rtol=1e-6, atol=0)


def test_uniform_numbers_pick_entries_of_the_table():
  io = load_golden("flow").io
  u = (io["train_indices"] + 0.5) / 1000
  sigma, t = flow_matching.times_at(jnp.asarray(u, jnp.float32))
  assert np.array_equal(sigma, io["train_sigma"]) and np.allclose(t, io["train_t"], rtol=1e-6, atol=0)
  sigma, t = flow_matching.times_at(jnp.asarray([0.0, 0.99999994]))
  assert np.allclose(sigma, [1.0, 0.001]) and np.allclose(t, [1000.0, 1.0])


@pytest.mark.parametrize("mode", ["discrete", "continuous"])
def test_times_are_uniform(mode):
  sigma, t = flow_matching.sample_times(jax.random.key(0), 20000, mode=mode)
  assert float(sigma.min()) > 0 and float(sigma.max()) <= 1
  assert np.allclose(t, 1000 * sigma, rtol=1e-6)
  counts, _ = np.histogram(sigma, bins=10, range=(0, 1))
  assert np.abs(counts - 2000).max() < 250
  on_grid = np.isclose(t, np.round(t), atol=1e-3).mean()
  assert on_grid == 1 if mode == "discrete" else on_grid < 0.1


def test_shift_moves_times_towards_noise():
  u = jnp.asarray([0.5])
  for mode in ("discrete", "continuous"):
    assert np.allclose(flow_matching.times_at(u, mode=mode, shift=3.0)[0], 0.75, atol=1e-3)  # 3/2 / (1 + 2/2)


def test_unknown_mode_is_told():
  with pytest.raises(UserError, match="logit"):
    flow_matching.times_at(jnp.zeros(1), mode="logit")


def test_dropped_conditions_are_all_zero_and_the_others_untouched():
  condition = jnp.ones((4000, 2, 3))
  out = flow_matching.drop_condition(jax.random.key(1), condition, 0.1)
  rows = np.asarray(out).reshape(4000, -1)
  assert set(rows.sum(axis=1)) == {0.0, 6.0}  # whole blocks, never rescaled
  assert 0.08 < (rows.sum(axis=1) == 0).mean() < 0.12
  assert np.array_equal(flow_matching.drop_condition(jax.random.key(1), condition, 0.0), condition)


def test_training_batch():
  golden = load_golden("flow")
  io = golden.io
  cfg = NextDiTConfig.from_reference(golden.config["dit"], {k: v.shape for k, v in golden.weights.items()})
  model = NextDiT(cfg)
  x1, noise = nhwc(io["train_latents"]), nhwc(io["train_noise"])
  abstract = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), x1, io["train_t"], io["cond"]))["params"]
  params = convert.to_ours(rules.RULES, golden.weights, abstract)
  noisy = flow_matching.interpolate(x1, noise, jnp.asarray(io["train_sigma"]))

  def loss(params, cond):
    velocity = model.apply({"params": params}, noisy, io["train_t"], cond * io["train_cond_keep_mask"][:, None, None])
    return jnp.mean(jnp.square(velocity - flow_matching.target(x1, noise))), velocity

  (value, velocity), (grads, grad_cond) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, io["cond"])
  ours = {"train_noisy": nhwc_back(noisy), "train_pred": nhwc_back(velocity), "train_loss": value}
  ours["train_grad_cond"] = grad_cond
  ours |= {f"train_grad:{k}": v for k, v in convert.to_reference(rules.RULES, grads)}
  computed = [k for k in io if k in ours]
  assert len(computed) == 4 + sum(k.startswith("train_grad:") for k in io)
  errors = {k: relative_error(ours[k], io[k]) for k in computed}
  over = {k: e for k, e in errors.items() if e >= (1e-3 if "grad" in k else 1e-4)}
  assert not over, over


def nhwc_back(x):
  return np.asarray(x).transpose(0, 3, 1, 2)
