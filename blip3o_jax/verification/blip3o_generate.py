"""From prompt to CLIP features: the query pass over padded prompts, then the guided loop of the DiT."""

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import UserError
from blip3o_jax.models.blip3o import Blip3o, Blip3oConfig, LatentQueries
from blip3o_jax.models.text_decoder import TextDecoder, TextDecoderConfig, text_positions
from blip3o_jax.porting.rules import blip3o
from blip3o_jax.porting.safetensors_io import Renamed
from blip3o_jax.verification import next_dit
from blip3o_jax.verification.flow_matching import compare_states, draw
from blip3o_jax.verification.recording import TRAJECTORY, Recording, load_params, nhwc, shapes
from blip3o_jax.verification.text_decoder import groups


def load(rec: Recording) -> tuple[Blip3o, next_dit.LoadedDiT, dict]:
  """(model, its DiT, {component: parameters} of backbone, queries and DiT).

  The prompts hold no pictures: of the backbone only the language model is taken, whatever stands beside it.
  """
  reader = rec.weights()
  backbone = blip3o.part(reader, "backbone")
  text = {key.replace("model.language_model.", "model.", 1): key for key in backbone if "visual." not in key}
  backbone = Renamed(backbone, text)
  cfg = rec.build(TextDecoderConfig.from_reference, rec.setting("qwen"), shapes(backbone))
  dit = next_dit.load(rec, rec.setting("dit"), reader)
  queries = blip3o.part(reader, "queries")
  if not queries:
    raise UserError("no model.latent_queries among the weights")
  count = queries.shape("latent_queries")[1]
  model = Blip3o(Blip3oConfig(cfg, dit.model.cfg, clip=None, unet=None, vae=None, queries=count))
  params = {
    "backbone": load_params("text_decoder", backbone, TextDecoder(cfg), method="touch"),
    "queries": load_params("queries", queries, LatentQueries(count, cfg.dim), 1),
    "dit": dit.params,
  }
  return model, dit, params


def check(rec: Recording) -> None:
  model, dit, params = load(rec)
  steps, guidance = int(rec.setting("steps")), float(rec.setting("guidance_scale"))
  count, shift = int(rec.setting("scheduler", "num_train_timesteps")), float(rec.setting("scheduler", "shift"))

  @jax.jit
  def query_states(params, tokens, mask):
    plain = text_positions(mask)[:, None]
    positions = jnp.broadcast_to(plain, (tokens.shape[0], 3, tokens.shape[1]))
    return model.apply({"params": params}, tokens, mask, positions, method="query_states")

  for prefix in groups(rec):
    tokens, mask = rec.input(f"{prefix}input_ids"), rec.input(f"{prefix}attention_mask").astype(bool)
    condition = query_states(params, jnp.asarray(tokens), jnp.asarray(mask))
    rec.compare(f"{prefix}query_hidden_states", condition)
    noise = nhwc(rec.input(f"{prefix}init_noise"))
    sample = draw(dit, dit.params, condition, noise, steps=steps, guidance=guidance, shift=shift, n=count)
    compare_states(rec, prefix, sample)
    latents = np.asarray(sample.latents)
    rec.compare(f"{prefix}clip_latents", latents.reshape(latents.shape[0], -1, latents.shape[-1]), TRAJECTORY)
