"""Whole pictures and answers, as the release's pipeline runs them: loops in Python over the parts' networks."""

from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from blip3o_jax.benchmarks.torch import parts
from blip3o_jax.benchmarks.torch.bridge import array, finished, nchw, tensor
from blip3o_jax.benchmarks.torch.rivals import Work
from blip3o_jax.inference import image as drawing


def generate(given: dict[str, Any]) -> Work:
  """Words to pixels (spec 3.3, part 6), each picture from a prompt of its own. The noise is ours, so that the pictures
  can be compared; the features of the decoder's null prompt are computed beforehand, since the release keeps them from
  its first picture on."""
  on, (prompt, blank, count, keys) = given["setup"], given["inputs"]
  cfg, params, (steps, decoder_steps) = on.cfg, given["params"], on.steps
  language = parts.open_backbone(cfg, params["backbone"], on.dtype).model.language_model
  dit, unet = parts.open_dit(cfg, params["dit"], on.dtype), parts.open_unet(cfg, params["unet"], on.dtype)
  vae = parts.open_vae(cfg, params["vae"], on.dtype)
  latents = tensor(params["queries"]["latent_queries"])[None]
  dtype, side = latents.dtype, cfg.image_size // cfg.vae.downsampling
  grid, latent = (*cfg.dit.grid, cfg.dit.in_channels), (side, side, cfg.unet.in_channels)
  noise = nchw(drawing.picture_noise(keys, 0, grid)), nchw(drawing.picture_noise(keys, 2, latent))
  unsaid_noise = nchw(drawing.picture_noise(drawing.picture_keys(0, [0] * count), 1, grid))

  def features(text, dit, tokens, x):
    words = text.get_input_embeddings()(torch.tensor([tokens] * count, device=latents.device))
    condition = parts.hidden_states(text, torch.cat([words, latents.expand(count, -1, -1)], dim=1))[:, -cfg.queries :]
    both = torch.cat([torch.zeros_like(condition), condition])
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(steps, sigmas=np.linspace(1.0, 1.0 / steps, steps), device=x.device)
    for t in flow.timesteps:
      null, said = dit(torch.cat([x, x]).to(dtype), t.long().expand(2 * count), both).float().chunk(2)
      x = flow.step(null + 3.0 * (said - null), t, x, return_dict=False)[0]
    return x.flatten(2).transpose(1, 2)

  with torch.no_grad():
    unsaid = features(language, dit, blank, unsaid_noise)

  def bind(wrap):
    text, drawer, denoiser, decode = wrap(language), wrap(dit), wrap(unet), wrap(vae.decode)

    def run():
      with torch.no_grad():
        context = torch.cat([features(text, drawer, prompt, noise[0]), unsaid]).to(dtype)
        euler = EulerDiscreteScheduler(**cfg.decoder_process.to_reference())
        euler.set_timesteps(decoder_steps, device=context.device)
        x = noise[1] * euler.init_noise_sigma
        for t in euler.timesteps:
          both = euler.scale_model_input(torch.cat([x, x]), t).to(dtype)
          said, null = parts.unet_step(denoiser, both, t, context, cfg.image_size).float().chunk(2)
          x = euler.step(null + 3.0 * (said - null), t, x, return_dict=False)[0]
        pixels = decode(x.to(dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return finished((pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1))

    return run

  ours = lambda pictures: {"pixels": np.stack(pictures[0])}
  return Work(bind, lambda pixels: {"pixels": array(pixels)}, ours)


def chat(given: dict[str, Any]) -> Work:
  """Greedy tokens by transformers' own `generate`, with its key-value cache."""
  on, (tokens,), new = given["setup"], given["inputs"], given["new"]
  model = parts.open_backbone(on.cfg, given["params"]["backbone"], on.dtype)
  tokens = tensor(tokens).long()
  settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}

  def bind(_):
    def run():
      with torch.no_grad():
        return finished(model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings))

    return run

  def greedy(said: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits of tokens [B, N] over the best ones at their places: all 1. Rounded otherwise, two that are almost alike
    change places, and all that is said after them is another answer, as right."""
    with torch.no_grad():
      logits = model(torch.cat([tokens, said], dim=1)).logits[:, tokens.shape[1] - 1 : -1].float()
    return {"greedy": array(logits.gather(-1, said[..., None])[..., 0] / logits.amax(-1))}

  return Work(
    bind, lambda said: greedy(said[:, tokens.shape[1] :]), lambda said: greedy(tensor(said).long()), compiles=False
  )
