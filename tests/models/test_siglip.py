"""The SigLIP tower against the recording of the reference, its weight table, and its published tensors."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.siglip import Siglip, SiglipConfig, adaptive_pool
from blip3o_jax.porting import convert
from blip3o_jax.porting.rules import siglip as rules


def abstract(cfg):
  images = jnp.zeros((1, cfg.image_size, cfg.image_size, 3))
  return nn.unbox(jax.eval_shape(Siglip(cfg).init, jax.random.key(0), images))["params"]


def run(cfg, weights):
  model, image = Siglip(cfg), load_golden("siglip").io["pixel_values"].transpose(0, 2, 3, 1)
  params = convert.to_ours(rules.RULES, weights, abstract(cfg))
  return jax.jit(lambda p, x: model.apply({"params": p}, x, mutable=["intermediates"]))(params, image)


@pytest.fixture(scope="module")
def replayed():
  golden = load_golden("siglip")
  cfg = SiglipConfig.from_reference(golden.config, {k: v.shape for k, v in golden.weights.items()})
  return golden, cfg, *run(cfg, golden.weights)


def test_every_recorded_array(replayed):
  golden, _, out, state = replayed
  seen = state["intermediates"]
  layers = seen["layers"]["block_out"][0]
  ours = {
    "embeddings": seen["embeddings"][0],
    "layer0_out": layers[0],
    "penultimate_layer_out": out.penultimate,
    "last_layer_out_before_post_layernorm": layers[-1],
    "last_hidden_state": out.last_hidden_state,
    "pooler_output": out.pooled,
    "penultimate_pooled": adaptive_pool(out.penultimate, 2),
  }
  assert set(ours) == set(golden.io) - {"pixel_values"}
  errors = {k: relative_error(ours[k], golden.io[k]) for k in ours}
  assert max(errors.values()) < 1e-4, errors
  assert np.array_equal(out.penultimate, layers[-2])


def test_remat_changes_nothing(replayed):
  golden, cfg, out, _ = replayed
  again, _ = run(dataclasses.replace(cfg, remat="full"), golden.weights)
  assert relative_error(again.last_hidden_state, out.last_hidden_state) < 1e-6


def test_weights_survive_the_way_there_and_back():
  golden = load_golden("siglip")
  cfg = SiglipConfig.from_reference(golden.config)
  params = convert.to_ours(rules.RULES, golden.weights, abstract(cfg))
  back = dict(convert.to_reference(rules.RULES, params))
  assert set(back) == set(golden.weights)
  assert all(np.array_equal(back[k], golden.weights[k]) for k in back)
  bare = {k.removeprefix("vision_model."): v for k, v in golden.weights.items()}
  assert jax.tree.all(jax.tree.map(np.array_equal, convert.to_ours(rules.RULES, bare, abstract(cfg)), params))


def test_without_the_head(replayed):
  """Weights may lack it, and a config may decline it: nothing else changes."""
  golden, _, with_head, _ = replayed
  headless = {k: v for k, v in golden.weights.items() if ".head." not in k}
  cfg = SiglipConfig.from_reference(golden.config, {k: v.shape for k, v in headless.items()})
  declined = SiglipConfig.from_reference(golden.config | {"vision_use_head": False}, dict.fromkeys(golden.weights))
  assert cfg == declined and not cfg.head
  for weights in (headless, golden.weights):
    out, _ = run(cfg, weights)
    assert out.pooled is None
    assert np.array_equal(out.last_hidden_state, with_head.last_hidden_state)


def test_pooling_to_a_size_that_does_not_divide():
  """3 rows to 2: the middle one counts in both (torch's adaptive_avg_pool2d)."""
  grid = jnp.arange(9.0).reshape(1, 9, 1)
  assert adaptive_pool(grid, 2)[0, :, 0].tolist() == [2.0, 3.0, 5.0, 6.0]
  assert adaptive_pool(jnp.arange(16.0).reshape(1, 16, 1), 2)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_pixels_beyond_the_last_patch_do_not_count():
  cfg = SiglipConfig(image_size=19, patch_size=8, width=8, layers=1, heads=2, mlp_dim=8, head=False)
  images = np.random.default_rng(0).standard_normal((1, 19, 19, 3)).astype(np.float32)
  params = {"params": jax.tree.map(lambda p: np.random.default_rng(1).standard_normal(p.shape), abstract(cfg))}
  apply = jax.jit(lambda x: Siglip(cfg).apply(params, x).last_hidden_state)
  changed = images.copy()
  changed[:, 16:], changed[:, :, 16:] = 9, 9
  assert apply(images).shape == (1, 4, 8) and np.array_equal(apply(images), apply(changed))


def test_one_layer_has_its_embeddings_as_last_but_one():
  cfg = SiglipConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2, mlp_dim=8, head=False)
  params = jax.tree.map(lambda p: np.full(p.shape, 0.1, p.dtype), abstract(cfg))
  apply = jax.jit(lambda p: Siglip(cfg).apply({"params": p}, jnp.ones((1, 8, 8, 3)), mutable=["intermediates"]))
  out, state = apply(params)
  assert np.array_equal(out.penultimate, state["intermediates"]["embeddings"][0])


def test_config_of_a_whole_siglip_and_silent_entries():
  vision = {"hidden_size": 1152, "image_size": 512, "intermediate_size": 4304, "num_hidden_layers": 27}
  config = {"model_type": "siglip", "vision_config": vision | {"num_attention_heads": 16, "patch_size": 16}}
  assert dataclasses.replace(SiglipConfig.from_reference(config), remat="full") == presets.SIGLIP2_SO400M
  with pytest.raises(UserError, match="hidden_act"):
    SiglipConfig.from_reference(vision | {"hidden_act": "gelu"})


def published():
  """Every tensor of google/siglip2-so400m-patch16-512's vision tower."""
  d, f = 1152, 4304
  linear = lambda name, out, into: {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
  norm = lambda name: {f"{name}.weight": (d,), f"{name}.bias": (d,)}
  mlp = lambda name: linear(f"{name}.fc1", f, d) | linear(f"{name}.fc2", d, f)
  keys = {"embeddings.patch_embedding.weight": (d, 3, 16, 16), "embeddings.patch_embedding.bias": (d,)}
  keys |= {"embeddings.position_embedding.weight": (1024, d)} | norm("post_layernorm")
  for i in range(27):
    layer = f"encoder.layers.{i}"
    keys |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2") | mlp(f"{layer}.mlp")
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
      keys |= linear(f"{layer}.self_attn.{name}", d, d)
  keys |= {
    "head.probe": (1, 1, d),
    "head.attention.in_proj_weight": (3 * d, d),
    "head.attention.in_proj_bias": (3 * d,),
  }
  keys |= linear("head.attention.out_proj", d, d) | norm("head.layernorm") | mlp("head.mlp")
  return {f"vision_model.{key}": shape for key, shape in keys.items()}


def test_published_tensors():
  specs = convert.reference_specs(rules.RULES, abstract(presets.SIGLIP2_SO400M))
  assert {key: spec.shape for key, spec in specs.items()} == published()
  assert (len(specs), sum(math.prod(s.shape) for s in specs.values())) == (448, 428_772_800)
