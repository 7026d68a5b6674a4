"""The parts one by one, by the libraries that the release is built of."""

from typing import Any

import torch
from diffusers import AutoencoderKL, LuminaNextDiT2DModel, UNet2DConditionModel
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from blip3o_jax.benchmarks.torch.bridge import array, build, finished, load, named, nchw, nhwc, tensor
from blip3o_jax.benchmarks.torch.eva import EvaClip
from blip3o_jax.benchmarks.torch.rivals import Work
from blip3o_jax.models.blip3o import CLIP_MEAN, CLIP_STD, Blip3oConfig
from blip3o_jax.models.next_dit import NextDiTConfig
from blip3o_jax.types import Params


class NextDiT(torch.nn.Module):
  """The release's NextDiTCrossAttn: its projection of the condition before diffusers' Lumina DiT (spec 2.2)."""

  def __init__(self, cfg: NextDiTConfig):
    super().__init__()
    self.model = LuminaNextDiT2DModel(
      sample_size=cfg.grid[0],
      patch_size=cfg.patch_size,
      in_channels=cfg.in_channels,
      hidden_size=cfg.dim,
      num_layers=cfg.layers,
      num_attention_heads=cfg.heads,
      num_kv_heads=cfg.kv_heads,
      norm_eps=cfg.norm_eps,
      learn_sigma=False,
      qk_norm=cfg.qk_norm,
      cross_attention_dim=cfg.dim,
    )
    for block in self.model.layers:  # the release's width; versions of diffusers compute others (spec 2.1)
      forward = block.feed_forward
      for name, widths in (("linear_1", (cfg.dim, cfg.ffn_dim)), ("linear_2", (cfg.ffn_dim, cfg.dim))):
        setattr(forward, name, torch.nn.Linear(*widths, bias=False))
      forward.linear_3 = torch.nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
    self.model.caption_projection = PixArtAlphaTextProjection(cfg.condition_dim, cfg.dim)
    self.rotary = get_2d_rotary_pos_embed_lumina(cfg.head_size, 384, 384)

  def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """x [B, C, h, w], t [B], condition [B, L, E] -> velocity [B, C, h, w]."""
    y = self.model.caption_projection(condition)
    mask = torch.ones(y.shape[:2], device=y.device)
    return self.model(x, t, y, mask, self.rotary, cross_attention_kwargs={}, return_dict=False)[0]


def open_dit(cfg: Blip3oConfig, params: Params, dtype: str) -> NextDiT:
  """The DiT with our weights."""
  return load(build(lambda: NextDiT(cfg.dit), dtype), named("dit", cfg, params), ("model.pad_token",))


def open_backbone(cfg: Blip3oConfig, params: Params, dtype: str) -> Qwen2_5_VLForConditionalGeneration:
  """Qwen2.5-VL with our weights; public checkpoints still have the names from before `language_model`."""
  content = cfg.backbone.to_reference()
  config = Qwen2_5_VLConfig(**content)
  renamed = {"model.": "model.language_model.", "visual.": "model.visual."}

  def rename(key: str) -> str:
    old = next((old for old in renamed if key.startswith(old)), "")
    return renamed.get(old, "") + key.removeprefix(old)

  state = ((rename(key), x) for key, x in named("backbone", cfg, params))
  return load(build(lambda: Qwen2_5_VLForConditionalGeneration(config), dtype), state, ("lm_head.",))


def open_encoder(cfg: Blip3oConfig, params: Params, dtype: str) -> EvaClip:
  """The CLIP encoder with our weights."""
  return load(build(lambda: EvaClip(cfg.clip), dtype), named("clip", cfg, params))


def open_unet(cfg: Blip3oConfig, params: Params, dtype: str) -> UNet2DConditionModel:
  """The decoder's UNet with our weights."""
  content = cfg.unet.to_reference(cfg.image_size // cfg.vae.downsampling)
  return load(build(lambda: UNet2DConditionModel(**content), dtype), named("unet", cfg, params))


def open_vae(cfg: Blip3oConfig, params: Params, dtype: str) -> AutoencoderKL:
  """The autoencoder with our weights."""
  return load(build(lambda: AutoencoderKL(**cfg.vae.to_reference()), dtype), named("vae", cfg, params))


def features_of(encoder: Any, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
  """uint8 [B, 3, S, S] -> pooled features [B, N, C] (spec 5.4)."""
  mean, deviation = (torch.tensor(x, device=pixels.device).reshape(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
  return encoder(((pixels / 255.0 - mean) / deviation).to(dtype))


def hidden_states(text: torch.nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
  """[B, L, D] -> [B, L, D] after the final norm, without padding."""
  positions = torch.arange(embeddings.shape[1], device=embeddings.device).expand(3, len(embeddings), -1)
  return text(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state


# ---- the work of each case


def _forward(network: torch.nn.Module, call, arrays) -> Work:
  """A forward pass of one network: call(wrapped network) -> result."""

  def bind(wrap):
    wrapped = wrap(network)

    def run():
      with torch.no_grad():
        return finished(call(wrapped))

    return run

  return Work(bind, lambda result: {"output": arrays(result)})


def dit(given: dict[str, Any]) -> Work:
  """The velocity."""
  on, (x, t, condition) = given["setup"], given["inputs"]
  network = open_dit(on.cfg, given["params"]["dit"], on.dtype)
  inputs = nchw(x), tensor(t), tensor(condition)
  return _forward(network, lambda net: net(*inputs), nhwc)


def dit_gradient(given: dict[str, Any]) -> Work:
  """The mean square of the velocity, and its gradients in all parameters and in the condition."""
  on, (x, t, condition) = given["setup"], given["inputs"]
  network = open_dit(on.cfg, given["params"]["dit"], on.dtype).requires_grad_(True)
  weights = {key: p for key, p in network.named_parameters() if key != "model.pad_token"}
  x, t, condition = nchw(x), tensor(t), tensor(condition).requires_grad_(True)

  def bind(wrap):
    wrapped = wrap(network)

    def run():
      loss = wrapped(x, t, condition).float().square().mean()
      return finished((loss, *torch.autograd.grad(loss, (condition, *weights.values()))))

    return run

  def ours(result):
    value, (grads, condition) = result
    return {"loss": value, "condition": condition, **dict(named("dit", on.cfg, grads["dit"]))}

  return Work(bind, lambda result: dict(zip(("loss", "condition", *weights), map(array, result), strict=True)), ours)


def backbone(given: dict[str, Any]) -> Work:
  """The release's one pass over prompt and queries."""
  on, (tokens, *_), params = given["setup"], given["inputs"], given["params"]
  text = open_backbone(on.cfg, params["backbone"], on.dtype).model.language_model
  tokens = tensor(tokens).long()
  latents = tensor(params["queries"]["latent_queries"]).expand(len(tokens), -1, -1)

  def call(net):
    embeddings = torch.cat([text.embed_tokens(tokens), latents], dim=1)
    return hidden_states(net, embeddings)[:, tokens.shape[1] :]

  return _forward(text, call, array)


def encoder(given: dict[str, Any]) -> Work:
  """Pooled features."""
  on, (pixels,) = given["setup"], given["inputs"]
  network = open_encoder(on.cfg, given["params"]["clip"], on.dtype)
  pixels = nchw(pixels)
  return _forward(network, lambda net: features_of(net, pixels, network.pos_embed.dtype), array)


def unet_step(network: Any, latents: torch.Tensor, t: torch.Tensor, context: torch.Tensor, size: int) -> torch.Tensor:
  """The UNet as the release's pipeline calls it (spec 6.2): the mean token, and the six size numbers."""
  sizes = torch.tensor([size, size, 0, 0, size, size], dtype=latents.dtype, device=latents.device)
  added = {"text_embeds": context.mean(1), "time_ids": sizes.expand(len(latents), -1)}
  return network(latents, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]


def unet(given: dict[str, Any]) -> Work:
  """One step."""
  on, (latents, t, context) = given["setup"], given["inputs"]
  network = open_unet(on.cfg, given["params"]["unet"], on.dtype)
  inputs = nchw(latents), tensor(t), tensor(context)
  return _forward(network, lambda net: unet_step(net, *inputs, on.cfg.image_size), nhwc)


def vae(given: dict[str, Any]) -> Work:
  """Latents to a picture."""
  on, (latents,) = given["setup"], given["inputs"]
  network = open_vae(on.cfg, given["params"]["vae"], on.dtype)
  latents = nchw(latents)

  def bind(wrap):
    network.decoder = decoder = wrap(network.decoder)

    def run():
      with torch.no_grad():
        network.decoder = decoder
        return finished(network.decode(latents, return_dict=False)[0])

    return run

  return Work(bind, lambda result: {"output": nhwc(result)})
