"""The formulas against the products that are really in the programs, counted from their jaxprs (nothing is run)."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from blip3o_jax.models import flops, presets
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.models.flops import Pass, training_flops
from blip3o_jax.models.qwen2_5_vl import VisionTower


def products(jaxpr) -> float:
  """Operations of all dot_general and convolutions of a jaxpr, loops times their length."""
  total = 0.0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      (inner, _), _ = params["dimension_numbers"]
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in inner)
    elif name == "conv_general_dilated":
      kernel, spec = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[spec[0]]
    else:
      inner = [getattr(p, "jaxpr", p) for p in params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
      total += (params["length"] if name == "scan" else 1) * sum(map(products, inner))
  return total


def counted(cfg, method, *shapes, **static):
  """Operations of one method of the whole model for abstract arguments."""
  model = Blip3o(cfg)
  params = jax.eval_shape(lambda: nn.unbox(model.init_components(jax.random.key(0), NEEDS[method])))
  args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
  call = lambda p, *a: model.apply({"params": p}, *a, method=method, **static)
  return products(jax.make_jaxpr(call)(params, *args).jaxpr)


NEEDS = {
  "clip_features": ("clip",),
  "velocity": ("dit",),
  "unet_predict": ("unet",),
  "vae_encode": ("vae",),
  "vae_decode": ("vae",),
  "query_states": ("backbone", "queries"),
}
F32, I32 = jnp.float32, jnp.int32


@pytest.mark.parametrize("name", ["micro", "blip3o-8b-paper"])
def test_every_part(name):
  cfg = presets.get(name)
  assert flops.clip_encoder(cfg.clip) == counted(cfg, "clip_features", ((1, *[cfg.clip.image_size] * 2, 3), jnp.uint8))
  q, dim = cfg.queries, cfg.backbone.dim
  grid, condition = (1, *cfg.dit.grid, cfg.dit.in_channels), (1, q, dim)
  assert flops.next_dit(cfg.dit, q) == counted(cfg, "velocity", (grid, F32), ((1,), F32), (condition, F32))
  side = cfg.image_size // cfg.vae.downsampling
  latents, context = (1, side, side, cfg.unet.in_channels), (1, math.prod(cfg.dit.grid), cfg.unet.context_dim)
  ours = flops.unet(cfg.unet, side, context[1])
  assert ours == counted(cfg, "unet_predict", (latents, F32), ((1,), F32), (context, F32))
  picture = (1, cfg.image_size, cfg.image_size, 3)
  assert flops.vae_encode(cfg.vae, cfg.image_size) == counted(cfg, "vae_encode", (picture, F32))
  assert flops.vae_decode(cfg.vae, cfg.image_size) == counted(cfg, "vae_decode", (latents, F32))


def test_the_sana_decoder():
  cfg = presets.get("blip3o-siglip2-sana")
  side, tokens = cfg.image_size // cfg.vae.downsampling, math.prod(cfg.dit.grid)
  latents, context = (1, side, side, cfg.unet.in_channels), (1, tokens, cfg.unet.context_dim)
  ours = flops.denoiser(cfg.unet, side, tokens)
  assert ours == counted(cfg, "unet_predict", (latents, F32), ((1,), F32), (context, F32))
  picture = (1, cfg.image_size, cfg.image_size, 3)
  assert flops.vae_encode(cfg.vae, cfg.image_size) == counted(cfg, "vae_encode", (picture, F32))
  assert flops.vae_decode(cfg.vae, cfg.image_size) == counted(cfg, "vae_decode", (latents, F32))
  halved = dataclasses.replace(cfg, vae=dataclasses.replace(cfg.vae, unshuffle=True, shuffle=not cfg.vae.shuffle))
  assert flops.vae_encode(halved.vae, cfg.image_size) == counted(halved, "vae_encode", (picture, F32))
  assert flops.vae_decode(halved.vae, cfg.image_size) == counted(halved, "vae_decode", (latents, F32))


@pytest.mark.parametrize("name", ["micro", "blip3o-4b", "blip3o-study"])
def test_backbone(name):
  """One pass over prompt and queries, and the prefix pass."""
  cfg, length = presets.get(name), 24
  text, q = getattr(cfg.backbone, "text", cfg.backbone), cfg.queries
  batch = (((1, length), I32), ((1, length), jnp.bool_), ((1, 3, length), I32))
  assert flops.text_decoder(text, length + q) == counted(cfg, "query_states", *batch, prefix_pass=False)
  ours = flops.text_decoder(text, length) + flops.text_decoder(text, q, cached=length)
  assert ours == counted(cfg, "query_states", *batch)


def test_vision():
  """All layers full, since the tower computes windows under a mask."""
  for name in ("micro", "blip3o-8b"):
    cfg = presets.get(name).backbone
    vision = dataclasses.replace(cfg.vision, full_layers=tuple(range(cfg.vision.layers)))
    patches = 16
    shapes = [(1, patches, vision.patch_dim), (1, patches, 2), (1, patches), (1, patches)]
    args = [jax.ShapeDtypeStruct(s, F32 if i == 0 else I32) for i, s in enumerate(shapes)]
    tower = VisionTower(vision)
    params = jax.eval_shape(lambda *a, t=tower: t.init(jax.random.key(0), *a), *args)
    count = products(jax.make_jaxpr(tower.apply)(params, *args).jaxpr)
    assert flops.qwen_vision(vision, patches) == count
    window = (vision.window_size // vision.patch_size) ** 2
    assert flops.qwen_vision(cfg.vision, 10 * window) < flops.qwen_vision(vision, 10 * window)


def test_training_counts_what_the_backward_pass_needs():
  passes = [Pass("clip", 100.0, gradient=False), Pass("backbone", 10.0), Pass("dit", 1.0)]
  assert training_flops(passes, {"dit"}) == 100 + 2 * 10 + 3 * 1
  assert training_flops(passes, {"dit", "backbone", "clip"}) == 100 + 3 * 10 + 3 * 1
