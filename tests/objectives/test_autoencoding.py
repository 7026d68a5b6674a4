"""The autoencoder's loss: reconstruction of a sampled latent, KL, and the latents' moments."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from blip3o_jax.objectives import autoencoding

B = 3


class Fake:
  """Latents 2 x 2 of 4 channels; the decoder paints everything in the mean of its latent."""

  def __init__(self, logvar=-1.0):
    rng = np.random.default_rng(0)
    self.mean = rng.normal(0.5, 2.0, (B, 2, 2, 4)).astype(np.float32)
    self.logvar = np.full_like(self.mean, logvar)

  def apply(self, variables, x, *, method):
    if method == "vae_encode":
      self.images = np.asarray(x)
      return jnp.asarray(self.mean), jnp.asarray(self.logvar)
    assert method == "vae_decode"
    self.latents = np.asarray(x)
    return jnp.broadcast_to(jnp.mean(x, axis=(1, 2, 3))[:, None, None, None], (B, 16, 16, 3))


def run(model, **cfg):
  total, weight, metrics = autoencoding.loss({}, {"pixels": tiny.pixels(B)}, jax.random.key(0), model=model, cfg=cfg)
  assert weight == B
  return total / weight, {k: v / weight for k, v in metrics.items()}


def test_formula():
  model = Fake()
  loss, metrics = run(model, kl_weight=0.01, moment_weight=0.3)
  images = tiny.pixels(B) / 127.5 - 1
  np.testing.assert_allclose(model.images, images, atol=1e-6)
  error = model.latents.mean(axis=(1, 2, 3))[:, None, None, None] - images
  mean, logvar = model.mean.astype(np.float64), model.logvar.astype(np.float64)
  kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=(1, 2, 3)).mean()  # of a picture, not of a number
  flat = mean.reshape(-1, 4)
  moment = np.mean(flat.mean(axis=0) ** 2 + (flat.std(axis=0) - 1) ** 2)
  want = {"l1": np.abs(error).mean(), "mse": (error**2).mean(), "kl": kl, "latent_var": flat.var(axis=0).mean()}
  assert set(metrics) == set(want)
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  np.testing.assert_allclose(loss, want["l1"] + want["mse"] + 0.01 * kl + 0.3 * moment, rtol=1e-4)


def test_the_latent_is_sampled_with_its_deviation():
  wide, narrow = Fake(logvar=2.0), Fake(logvar=-30.0)
  run(wide), run(narrow)
  np.testing.assert_allclose(narrow.latents, narrow.mean, atol=1e-5)
  noise = (wide.latents - wide.mean) / np.exp(1.0)
  assert 0.6 < noise.std() < 1.4 and abs(noise.mean()) < 0.5 and len(np.unique(noise.round(4))) > 40


def test_the_whole_vae_learns():
  model, params = tiny.model(), tiny.params()["vae"]
  batch = {"pixels": tiny.pixels(2)}
  loss = lambda p: autoencoding.loss({"vae": p}, batch, jax.random.key(0), model=model, cfg={})[0]
  value, grads = tiny.quick_jit(jax.value_and_grad(loss))(params)
  assert np.isfinite(value)
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
  assert still == []
