"""The Sana decoder's loss: path, target and time over latents, black pictures for dropped ones, who learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoders import Fake

from blip3o_jax.diffusion.dpm_solver import DPMSolverConfig
from blip3o_jax.diffusion.euler_discrete import EulerDiscreteConfig
from blip3o_jax.errors import UserError
from blip3o_jax.objectives import decoding, flow_decoding

B = 48


def run(process=None, **cfg):
  model, batch = (
    Fake(B, latents=(1.0, 2.0), process=process or DPMSolverConfig()),
    {"pixels": jnp.asarray(tiny.pixels(B))},
  )
  return model, flow_decoding.loss({}, batch, jax.random.key(0), model=model, cfg=cfg)


def test_formula():
  """From what the network is given: x = (1 - s) x0 + s noise at time 1000 s, and it should say noise - x0."""
  model, (total, weight, metrics) = run(drop=0.0)
  noisy, t, context = (np.asarray(x, np.float64) for x in model.seen["unet_predict"])
  np.testing.assert_allclose(t, np.round(t), atol=1e-3)
  assert 0 < t.min() < 150 and 850 < t.max() <= 1000
  np.testing.assert_array_equal(context, model.features)
  s, latents = t[:, None, None, None] / 1000, np.asarray(model.latents, np.float64)
  noise = (noisy - (1 - s) * latents) / s
  assert abs(noise[t > 200].std() - 1) < 0.1 and abs(noise[t > 200].mean()) < 0.1
  mse = np.mean((np.cos(noisy) - (noise - latents)) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(total, mse.sum(), rtol=1e-3)
  assert weight == B
  np.testing.assert_allclose(metrics["mse_high_noise"] / B, mse[t > 800].mean(), rtol=1e-3)
  between = np.asarray(run(times="continuous")[0].seen["unet_predict"][1])
  assert np.abs(between - np.round(between)).max() > 0.1


def test_each_kind_of_decoder_has_its_objective():
  with pytest.raises(UserError, match="take objective decoding"):
    run(process=EulerDiscreteConfig())
  with pytest.raises(UserError, match="take objective flow_decoding"):
    decoding.loss({}, {}, jax.random.key(0), model=Fake(B, process=DPMSolverConfig()), cfg={})


def test_a_dropped_picture_is_a_black_one():
  model, _ = run(drop=0.5)
  context = np.asarray(model.seen["unet_predict"][2])
  dropped = (context == 7.0).all(axis=(1, 2))
  assert 10 < dropped.sum() < B - 10
  np.testing.assert_array_equal(context[~dropped], np.asarray(model.features)[~dropped])


def test_transformer_and_connector_learn():
  model, params = tiny.model(**tiny.VARIANTS["sana"]), tiny.params(0, "sana")
  batch = {"pixels": tiny.pixels(2)}
  loss = lambda p: flow_decoding.loss(p, batch, jax.random.key(0), model=model, cfg={"drop": 0.0})[0]
  value, grads = tiny.quick_jit(jax.value_and_grad(loss))({name: params[name] for name in flow_decoding.COMPONENTS})
  assert np.isfinite(value)
  for name in ("clip", "vae"):
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads[name])), name
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads["unet"]) if not g.any()]
  assert still == []
