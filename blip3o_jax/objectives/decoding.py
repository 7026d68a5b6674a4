"""The diffusion decoder: CLIP features -> VAE latents, epsilon or v prediction on SDXL's noise schedule (spec 6).

The release takes this part ready-made from Emu2. Its null condition for pictures is the pooled features of an all-zero
normalised image (spec 6.5), so that is what a dropped condition is trained as here.

`noise` mixes up to that share of noise into the features of a picture, as the conditioning augmentation of cascaded
models does (Ho et al. 2021, arXiv 2106.15282, section 4): the decoder will be given features that a DiT drew, and must
not trust their finest detail.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.diffusion import euler_discrete, flow_matching
from blip3o_jax.errors import UserError
from blip3o_jax.models import flops
from blip3o_jax.models.flops import Pass
from blip3o_jax.objectives import at_high_noise

COMPONENTS = ("clip", "unet", "vae")


def passes(cfg, shapes, args):
  """See objectives."""
  side, tokens = shapes["pixels"][1], (cfg.clip.side // cfg.clip.pool_stride) ** 2
  return [
    Pass("clip", flops.clip_encoder(cfg.clip), gradient=False),
    Pass("vae", flops.vae_encode(cfg.vae, side), gradient=False),
    Pass("unet", flops.denoiser(cfg.unet, side // cfg.vae.downsampling, tokens)),
  ]


def loss(params, batch, rng, *, model, cfg):
  """Mean squared error of the UNet's prediction at a uniform time. `batch["pixels"]` [B, H, W, 3] uint8."""
  return _loss(params, batch, rng, model=model, **cfg)


def _loss(params, batch, rng, *, model, drop: float = 0.1, noise: float = 0.0):
  call = lambda *args, method: model.apply({"params": params}, *args, method=method)
  process = model.cfg.decoder_process
  if not isinstance(process, euler_discrete.EulerDiscreteConfig):
    raise UserError("objective decoding: this model's decoder draws by flow matching; take objective flow_decoding")
  pixels = batch["pixels"]
  b = pixels.shape[0]
  time_rng, noise_rng, drop_rng, share_rng, mix_rng = jax.random.split(rng, 5)

  context = jax.lax.stop_gradient(call(pixels, method="clip_features"))
  if noise:
    share = noise * jax.random.uniform(share_rng, (b,))
    context = flow_matching.interpolate(context, jax.random.normal(mix_rng, context.shape), share)
  null = jax.lax.stop_gradient(call(method="null_clip_features"))
  dropped = jax.random.bernoulli(drop_rng, drop, (b, 1, 1))
  context = jnp.where(dropped, null, context)

  latents = jax.lax.stop_gradient(call(pixels, method="picture_latents"))
  t = jax.random.randint(time_rng, (b,), 0, process.train_steps)
  added = jax.random.normal(noise_rng, latents.shape)
  noisy = euler_discrete.add_noise(process, latents, added, t)
  target = euler_discrete.training_target(process, latents, added, t)
  output = call(noisy, t, context, method="unet_predict").astype(jnp.float32)

  mse = jnp.mean(jnp.square(output - target), axis=(1, 2, 3))
  return jnp.sum(mse), jnp.float32(b), at_high_noise(mse, t >= 800)
