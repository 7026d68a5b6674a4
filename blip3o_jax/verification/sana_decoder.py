"""The SigLIP-conditioned decoder: connector and one call of Sana, its autoencoder both ways, and the guided
DPM-Solver++ loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.diffusion.dpm_solver import DPMSolverConfig, dpm_tables, sample_dpm_solver
from blip3o_jax.models.autoencoder_dc import AutoencoderDC, AutoencoderDCConfig
from blip3o_jax.models.sana import Sana, SanaConfig
from blip3o_jax.porting.rules import blip3o
from blip3o_jax.porting.safetensors_io import Renamed
from blip3o_jax.verification.flow_matching import compare_states, per_image
from blip3o_jax.verification.recording import TRAJECTORY, Recording, load_params, nchw, nhwc, shapes, sown


def check(rec: Recording) -> None:
  reader = rec.weights()
  own = Renamed(reader, {key: key for key in reader if key.startswith(("transformer.", "connector."))})
  config = rec.setting("transformer"), shapes(own), rec.config.get("connector")
  sana = Sana(rec.build(SanaConfig.from_reference, *config))
  cfg, p = sana.cfg, sana.cfg.patch_size
  dummies = jnp.zeros((1, p, p, cfg.in_channels)), jnp.zeros(1), jnp.zeros((1, 1, cfg.source_dim or cfg.condition_dim))
  params = load_params("sana", own, sana, *dummies)
  if any(name in ("x", "timestep", "output") or name.startswith("act_") for name in rec.names):
    _call(rec, sana, params)

  vae = AutoencoderDC(rec.build(AutoencoderDCConfig.from_reference, rec.setting("vae")))
  side = vae.cfg.downsampling
  vae_params = load_params("dc_ae", blip3o.part(reader, "vae"), vae, jnp.zeros((1, side, side, vae.cfg.in_channels)))
  run = jax.jit(lambda p, x, method: vae.apply({"params": p}, x, method=method), static_argnums=2)
  decode = lambda z: run(vae_params, z / vae.cfg.scaling_factor, "decode")
  if "dcae_encode_in" in rec or "dcae_latent" in rec:
    rec.compare("dcae_latent", nchw(run(vae_params, nhwc(rec.input("dcae_encode_in")), "encode")))
  if "dcae_scaled_latents" in rec or "dcae_decode_out" in rec:
    rec.compare("dcae_decode_out", nchw(decode(nhwc(rec.input("dcae_scaled_latents")))))

  if any(name.startswith(("dpm_", "sample_")) for name in rec.names):
    solver = rec.build(DPMSolverConfig.from_reference, rec.setting("scheduler"))
    tables = dpm_tables(solver, int(rec.setting("steps")))
    rec.compare("dpm_timesteps", tables.timesteps)
    rec.compare("dpm_sigmas", tables.sigmas)
  if any(name.startswith("sample_") for name in rec.names):
    latents = _draw(rec, sana, params, solver)
    rec.compare("sample_final", nchw(latents), TRAJECTORY)
    rec.compare("sample_image", np.clip(nchw(decode(latents)) / 2 + 0.5, 0, 1), TRAJECTORY)
  else:
    rec.skip("null_z_latents", "no sampling is recorded")


def _call(rec: Recording, sana: Sana, params: Any) -> None:
  """One call of connector and transformer."""
  inputs = nhwc(rec.input("x")), rec.input("timestep"), rec.input("z_latents")
  run = jax.jit(lambda p, *inputs: sana.apply({"params": p}, *inputs, mutable=["intermediates"]))
  velocity, state = run(params, *inputs)
  rec.compare("output", nchw(velocity))
  if sana.cfg.source_dim:
    rec.compare("act_connector", sown(state, "connected"))
  for name, layer in rec.matching(r"act_block(\d+)(?:_out)?"):
    if layer < sana.cfg.layers:
      rec.compare(name, sown(state, "layers", "block_out")[layer])


def _draw(rec: Recording, sana: Sana, params: Any, solver: DPMSolverConfig) -> jax.Array:
  """The guided loop; compares its steps and returns the last latents."""
  steps, guidance = int(rec.setting("steps")), float(rec.setting("guidance_scale"))
  noise = nhwc(rec.input("sample_init_noise"))
  cond = per_image(rec.input("z_latents"), len(noise))
  if guidance != 1:
    cond = jnp.concatenate([per_image(rec.input("null_z_latents"), len(noise)), cond])
  else:
    rec.skip("null_z_latents", "with guidance 1 there is no unconditional half")

  def draw(params, cond, noise):
    projected = sana.apply({"params": params}, cond, method="project")
    velocity = lambda x, t: sana.apply({"params": params}, x, t, None, projected)
    return sample_dpm_solver(velocity, noise, solver, steps=steps, guidance=guidance, trajectory=True)

  sample = jax.jit(draw)(params, cond, noise)
  compare_states(rec, "", sample)
  return sample.latents
