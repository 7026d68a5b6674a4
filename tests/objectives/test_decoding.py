"""The decoder's loss: noised latents in, epsilon or v out, and what takes the place of a dropped picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoders import Fake

from blip3o_jax.diffusion.euler_discrete import EulerDiscreteConfig
from blip3o_jax.objectives import decoding

B = 32


def run(prediction="epsilon", seed=0, **cfg):
  model = Fake(B, process=EulerDiscreteConfig(prediction=prediction))
  batch = {"pixels": jnp.asarray(tiny.pixels(B))}
  return model, decoding.loss({}, batch, jax.random.key(seed), model=model, cfg=cfg)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_formula(prediction):
  model, (total, weight, metrics) = run(prediction, drop=0.0)
  noisy, t, context = (np.asarray(x) for x in model.seen["unet_predict"])
  np.testing.assert_array_equal(context, model.features)
  assert t.dtype == np.int32 and 0 <= t.min() < 150 and 850 < t.max() < 1000
  assert model.seen["picture_latents"][0].dtype == np.uint8

  # SDXL's noise schedule, written out again.
  alpha = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[t][:, None, None, None]
  latents = np.asarray(model.latents, np.float64)
  noise = (noisy - np.sqrt(alpha) * latents) / np.sqrt(1 - alpha)
  assert abs(noise[t > 100].std() - 1) < 0.1 and abs(noise[t > 100].mean()) < 0.1
  target = noise if prediction == "epsilon" else np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * latents
  mse = np.mean((np.cos(noisy) - target) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(total, mse.sum(), rtol=1e-3)
  assert weight == B
  np.testing.assert_allclose(metrics["mse_high_noise"] / B, mse[t >= 800].mean(), rtol=1e-3)


def test_a_dropped_picture_is_the_null_picture():
  model, _ = run(drop=0.5)
  context = np.asarray(model.seen["unet_predict"][2])
  dropped = (context == 7.0).all(axis=(1, 2))
  assert 6 < dropped.sum() < B - 6
  np.testing.assert_array_equal(context[~dropped], np.asarray(model.features)[~dropped])


def test_noise_is_mixed_into_the_features_by_picture():
  model, _ = run(drop=0.0, noise=0.6)
  context, features = np.asarray(model.seen["unet_predict"][2]), np.asarray(model.features)
  # (1 - s) x + s e with s uniform in 0..0.6: the difference has variance s^2 (x^2 + 1).
  share = np.sqrt(np.mean((context - features) ** 2, axis=(1, 2)) / (np.mean(features**2, axis=(1, 2)) + 1))
  assert share.min() < 0.15 and 0.45 < share.max() < 0.85 and 0.2 < share.mean() < 0.4


def test_only_the_unet_learns():
  model, params = tiny.model(), tiny.params()
  batch = {"pixels": tiny.pixels(2)}
  loss = lambda p: decoding.loss(p, batch, jax.random.key(0), model=model, cfg={"drop": 0.5})[0]
  value, grads = tiny.quick_jit(jax.value_and_grad(loss))({name: params[name] for name in decoding.COMPONENTS})
  assert np.isfinite(value)
  for name in ("clip", "vae"):
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads[name])), name
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads["unet"]) if not g.any()]
  assert still == []
