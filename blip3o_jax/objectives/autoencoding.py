"""The variational autoencoder: pixels -> latents -> pixels.

Rombach et al. 2022 (arXiv 2112.10752), without the adversarial and perceptual terms. One term is ours: `moment_weight`
holds the latents of a batch at mean 0 and variance 1, so that `scaling_factor` is 1 whatever the seed (the release's
decoder needs the measured 0.13025 in its place).
"""

import jax
import jax.numpy as jnp

from blip3o_jax.models import flops
from blip3o_jax.models.flops import Pass

COMPONENTS = ("vae",)


def passes(cfg, shapes, args):
  """See objectives."""
  side = shapes["pixels"][1]
  return [Pass("vae", flops.vae_encode(cfg.vae, side)), Pass("vae", flops.vae_decode(cfg.vae, side))]


def loss(params, batch, rng, *, model, cfg):
  """Absolute plus squared error of the reconstruction, and a small KL. `batch["pixels"]` [B, H, W, 3] uint8."""
  return _loss(params, batch, rng, model=model, **cfg)


def _loss(params, batch, rng, *, model, kl_weight: float = 1e-6, moment_weight: float = 0.1):
  images = batch["pixels"].astype(jnp.float32) / 127.5 - 1.0
  mean, logvar = model.apply({"params": params}, images, method="vae_encode")
  noise = jax.random.normal(rng, mean.shape)
  out = model.apply({"params": params}, mean + jnp.exp(0.5 * logvar) * noise, method="vae_decode")
  error = out.astype(jnp.float32) - images
  mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
  l1, mse = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
  kl = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar) / mean.shape[0]
  channel_mean = jnp.mean(mean, axis=(0, 1, 2))
  channel_var = jnp.mean(jnp.square(mean), axis=(0, 1, 2)) - jnp.square(channel_mean)
  moment = jnp.mean(jnp.square(channel_mean) + jnp.square(jnp.sqrt(channel_var + 1e-6) - 1.0))
  b = images.shape[0]
  metrics = {"l1": l1, "mse": mse, "kl": kl, "latent_var": jnp.mean(channel_var)}
  total = l1 + mse + kl_weight * kl + moment_weight * moment
  return total * b, jnp.float32(b), {k: v * b for k, v in metrics.items()}
