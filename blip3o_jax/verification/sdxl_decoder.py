"""The CLIP-conditioned decoder: one UNet call, the guided Euler loop, and the autoencoder both ways."""

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.diffusion.euler_discrete import EulerDiscreteConfig, euler_tables, sample_euler_discrete
from blip3o_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from blip3o_jax.models.unet import UNet, UNetConfig
from blip3o_jax.porting.rules import blip3o
from blip3o_jax.verification.flow_matching import compare_states, per_image
from blip3o_jax.verification.recording import TRAJECTORY, Recording, load_params, nchw, nhwc


def check(rec: Recording) -> None:
  reader = rec.weights()
  unet = UNet(rec.build(UNetConfig.from_reference, rec.setting("unet")))
  vae = AutoencoderKL(rec.build(AutoencoderKLConfig.from_reference, rec.setting("vae")))
  side = vae.cfg.downsampling
  vae_params = load_params("vae", blip3o.part(reader, "vae"), vae, jnp.zeros((1, side, side, vae.cfg.in_channels)))
  decode = jax.jit(lambda p, z: vae.apply({"params": p}, z, method="decode"))

  if "vae_encode_in" in rec or "vae_mean" in rec or "vae_logvar" in rec:
    encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))
    mean, logvar = encode(vae_params, nhwc(rec.input("vae_encode_in")))
    rec.compare("vae_mean", nchw(mean))
    rec.compare("vae_logvar", nchw(logvar))
  if "vae_decode_in" in rec or "vae_decode_out" in rec:
    rec.compare("vae_decode_out", nchw(decode(vae_params, nhwc(rec.input("vae_decode_in")))))

  # One UNet call, as the loop makes it at its first step: conditional half first (spec 6.3).
  steps, guidance = int(rec.setting("steps")), float(rec.setting("guidance_scale"))
  process = rec.build(EulerDiscreteConfig.from_reference, rec.setting("scheduler"))
  noise = nhwc(rec.input("init_noise"))
  context = per_image(rec.input("cond"), len(noise))
  if guidance > 1:
    context = jnp.concatenate([context, per_image(rec.input("null_cond"), len(noise))])
  else:
    rec.skip("null_cond", "without guidance there is no unconditional half")
  tables = euler_tables(process, steps)
  rec.compare("sigmas", tables.sigmas)
  rec.compare("timesteps", tables.timesteps)
  rec.compare("init_noise_sigma", np.float32(tables.init_noise_sigma))

  time_ids = jnp.asarray(rec.input("time_ids"), jnp.float32).reshape(-1, 6)
  time_ids = jnp.repeat(time_ids, -(-len(context) // len(time_ids)), axis=0)[: len(context)]
  pooled = jnp.mean(context, axis=1)
  rec.compare("unet_ehs", context)
  rec.compare("text_embeds", pooled)

  start = jnp.tile(
    noise * tables.init_noise_sigma / np.sqrt(tables.sigmas[0] ** 2 + 1), (2 if guidance > 1 else 1, 1, 1, 1)
  )
  rec.compare("unet_sample_in", nchw(start))
  rec.compare("unet_t", tables.timesteps[0])
  params = load_params("unet", blip3o.part(reader, "unet"), unet, start, 0.0, context, pooled, time_ids)
  predict = lambda p, x, t: unet.apply({"params": p}, x, t, context, pooled, time_ids)
  rec.compare("unet_out", nchw(jax.jit(predict)(params, start, tables.timesteps[0])))

  sample = jax.jit(
    lambda p: sample_euler_discrete(
      lambda x, t: predict(p, x, t), noise, process, steps=steps, guidance=guidance, trajectory=True
    )
  )(params)
  compare_states(rec, "", sample)
  rec.compare("latents_final", nchw(sample.latents), TRAJECTORY)

  image = decode(vae_params, sample.latents / vae.cfg.scaling_factor + vae.cfg.shift)
  image = np.clip(np.asarray(image) / 2 + 0.5, 0, 1)
  rec.compare("image", image, TRAJECTORY)
  rec.compare("image_uint8", np.round(image * 255))
