"""The Sana decoder: pooled SigLIP2 features -> DC-AE latents by flow matching (spec 7.2).

  x_sigma = (1 - sigma) x0 + sigma noise,   target noise - x0,   network time = 1000 sigma

Transformer and connector train; SigLIP2 and the autoencoder are frozen. A dropped condition is a black picture.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.diffusion import flow_matching
from blip3o_jax.diffusion.dpm_solver import DPMSolverConfig
from blip3o_jax.errors import UserError
from blip3o_jax.objectives import at_high_noise, decoding

COMPONENTS = decoding.COMPONENTS
passes = decoding.passes


def loss(params, batch, rng, *, model, cfg):
  """Mean squared error of the predicted velocity. `batch["pixels"]` [B, H, W, 3] uint8."""
  return _loss(params, batch, rng, model=model, **cfg)


def _loss(params, batch, rng, *, model, drop: float = 0.1, times: str = "discrete"):
  call = lambda *args, method: model.apply({"params": params}, *args, method=method)
  if not isinstance(model.cfg.decoder_process, DPMSolverConfig):
    raise UserError("objective flow_decoding: this model's decoder predicts noise; take objective decoding")
  pixels = batch["pixels"]
  b = pixels.shape[0]
  time_rng, noise_rng, drop_rng = jax.random.split(rng, 3)

  context, null = call(pixels, method="clip_features"), call(method="null_clip_features")
  dropped = jax.random.bernoulli(drop_rng, drop, (b, 1, 1))
  context = jax.lax.stop_gradient(jnp.where(dropped, null, context))
  latents = jax.lax.stop_gradient(call(pixels, method="picture_latents"))
  sigma, t = flow_matching.sample_times(time_rng, b, mode=times)
  noise = jax.random.normal(noise_rng, latents.shape)
  velocity = call(flow_matching.interpolate(latents, noise, sigma), t, context, method="unet_predict")

  mse = jnp.mean(jnp.square(velocity.astype(jnp.float32) - flow_matching.target(latents, noise)), axis=(1, 2, 3))
  return jnp.sum(mse), jnp.float32(b), at_high_noise(mse, sigma > 0.8)
