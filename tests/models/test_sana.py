"""Sana and its connector against the recording of the reference, its weight table, and its published tensors."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.sana import Connector, Sana, SanaConfig
from blip3o_jax.porting import convert
from blip3o_jax.porting.rules import sana as rules

TINY = SanaConfig(
  in_channels=4,
  out_channels=3,
  layers=2,
  heads=2,
  head_size=4,
  cross_heads=1,
  cross_head_size=6,
  mlp_dim=12,
  condition_dim=10,
  source_dim=5,
)


def abstract(cfg):
  condition = jnp.zeros((1, 2, cfg.source_dim or cfg.condition_dim))
  x = jnp.zeros((1, cfg.patch_size, cfg.patch_size, cfg.in_channels))
  return nn.unbox(jax.eval_shape(Sana(cfg).init, jax.random.key(0), x, jnp.zeros(1), condition))["params"]


def inputs(cfg, h=4, w=6):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return normal(2, h, w, cfg.in_channels), np.array([900, 30], np.float32), normal(2, 3, cfg.source_dim)


def random_params(cfg):
  rng = np.random.default_rng(1)
  draw = lambda p: (rng.standard_normal(p.shape) / np.sqrt(math.prod(p.shape[-2:-1]))).astype(np.float32)
  return jax.tree.map(draw, abstract(cfg))


@functools.partial(jax.jit, static_argnums=0)
def predict(cfg, params, *args):
  return Sana(cfg).apply({"params": params}, *args)


@pytest.fixture(scope="module")
def recorded():
  golden = load_golden("sana_decoder")
  weights = {k: v for k, v in golden.weights.items() if k.startswith("transformer.")}
  shapes = {k: v.shape for k, v in weights.items()}
  cfg = SanaConfig.from_reference(golden.config["transformer"], shapes, golden.config["connector"])
  io = golden.io
  args = io["x"].transpose(0, 2, 3, 1), io["timestep"], io["z_latents"]
  return cfg, weights, convert.to_ours(rules.RULES, weights, abstract(cfg)), args, io


@pytest.fixture(scope="module")
def replayed(recorded):
  cfg, _, params, args, _ = recorded
  return jax.jit(lambda p: Sana(cfg).apply({"params": p}, *args, mutable=["intermediates"]))(params)


def test_recorded_forward(recorded, replayed):
  io, (out, state) = recorded[-1], replayed
  seen = state["intermediates"]
  assert relative_error(out.transpose(0, 3, 1, 2), io["output"]) < 1e-4
  assert relative_error(seen["connected"][0], io["act_connector"]) < 1e-4
  assert relative_error(seen["layers"]["block_out"][0][0], io["act_block0"]) < 1e-4


def test_projected_condition_equals_plain(recorded, replayed):
  cfg, _, params, (x, t, condition), _ = recorded
  projected = jax.jit(lambda p: Sana(cfg).apply({"params": p}, condition, method="project"))(params)
  assert projected.keys.shape == (cfg.layers, 2, 12, cfg.cross_heads, cfg.cross_head_size)
  assert relative_error(predict(cfg, params, x, t, None, projected), replayed[0]) < 1e-5


def test_remat_changes_nothing(recorded, replayed):
  cfg, _, params, args, _ = recorded
  assert relative_error(predict(dataclasses.replace(cfg, remat="full"), params, *args), replayed[0]) < 1e-6


def test_weights_survive_the_way_there_and_back(recorded):
  _, weights, params, _, _ = recorded
  back = dict(convert.to_reference(rules.RULES, params))
  assert set(back) == set(weights)
  assert all(np.array_equal(back[k], weights[k]) for k in back)


def test_all_spellings_of_the_keys(recorded):
  """The released wrapper, the Reconstruction branch's, and diffusers' own file, which has no connector (spec 7.3)."""
  cfg, weights, params, _, _ = recorded
  same = lambda a, b: (
    jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))
  )
  branch = {k.removeprefix("transformer."): v for k, v in weights.items()}
  assert {k.split(".")[0] for k in branch} == {"transformer", "connector"}
  assert same(convert.to_ours(rules.RULES, branch, abstract(cfg)), params)
  bare = {k.removeprefix("transformer."): v for k, v in branch.items() if not k.startswith("connector.")}
  config = load_golden("sana_decoder").config["transformer"]
  plain = SanaConfig.from_reference(config, {k: v.shape for k, v in bare.items()})
  assert plain == dataclasses.replace(cfg, source_dim=None)
  assert same(
    convert.to_ours(rules.RULES, bare, abstract(plain)), {k: v for k, v in params.items() if k != "connector"}
  )


def test_a_plain_transformer_reads_conditions_of_its_own_width(recorded, replayed):
  cfg, _, params, (x, t, _), io = recorded
  plain = dataclasses.replace(cfg, source_dim=None)
  own = {k: v for k, v in params.items() if k != "connector"}
  assert relative_error(predict(plain, own, x, t, io["act_connector"]), replayed[0]) < 1e-4


def test_fresh_connectors_start_at_the_size_of_a_text_encoder():
  params = nn.unbox(Connector(TINY).init(jax.random.key(0), jnp.ones((1, 1, 5))))["params"]
  assert np.allclose(params["norm"]["scale"], 2.3452, atol=1e-4)


def test_patches_are_read_as_a_convolution_and_written_row_column_channel():
  cfg = dataclasses.replace(TINY, patch_size=2, layers=1)
  params, (x, t, condition) = random_params(cfg), inputs(cfg)
  model = Sana(cfg)
  embed = model.bind({"params": params}).patch_embed(x)
  kernel = params["patch_embed"]["kernel"]
  conv = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  assert relative_error(embed, conv + params["patch_embed"]["bias"]) < 1e-5
  params["out_fc"] = {"kernel": np.zeros((8, 12), np.float32), "bias": np.arange(12, dtype=np.float32)}
  out = predict(cfg, params, x, t, condition)
  assert out.shape == (2, 4, 6, 3)
  np.testing.assert_array_equal(out[1, 2:, 4:], np.arange(12).reshape(2, 2, 3))


@pytest.mark.parametrize("norm", [False, True])
def test_normed_queries_and_keys_have_no_size(norm):
  cfg = dataclasses.replace(TINY, qk_norm=norm)
  params, args = random_params(cfg), inputs(cfg)
  scaled = jax.tree.map(lambda x: x, params)
  for x in ("q", "k"):
    scaled["layers"][f"cross_{x}"] = jax.tree.map(lambda x: 30 * x, params["layers"][f"cross_{x}"])
  error = relative_error(predict(cfg, scaled, *args), predict(cfg, params, *args))
  assert error < 1e-3 if norm else error > 1e-2
  assert any("norm_q" in key for key in convert.reference_specs(rules.RULES, params)) == norm


def test_a_learned_norm_and_biases_of_the_self_attention():
  cfg = dataclasses.replace(TINY, norm_affine=True, attention_bias=True)
  names = set(convert.reference_specs(rules.RULES, abstract(cfg))) - set(
    convert.reference_specs(rules.RULES, abstract(TINY))
  )
  block = "transformer.transformer.transformer_blocks.1"
  leaves = {"norm2.weight", "norm2.bias", *(f"attn1.to_{x}.bias" for x in "qkv")}
  assert {name for name in names if name.startswith(block)} == {f"{block}.{leaf}" for leaf in leaves}


@pytest.mark.parametrize(
  "change",
  [{"interpolation_scale": 1}, {"guidance_embeds": True}, {"cross_attention_dim": 7}, {"qk_norm": "layer_norm"}],
)
def test_other_structures_are_refused(change):
  config = load_golden("sana_decoder").config
  with pytest.raises(UserError, match=next(iter(change))):
    SanaConfig.from_reference(config["transformer"] | change)
  with pytest.raises(UserError, match="connector act"):
    SanaConfig.from_reference(config["transformer"], None, {"act": "relu"})


def published():
  """Every tensor of Efficient-Large-Model/Sana_1600M_512px_diffusers' transformer."""
  d, hidden = 2240, 5600
  linear = lambda name, out, into: {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
  keys = {"scale_shift_table": (2, d), "caption_norm.weight": (d,)}
  keys |= {"patch_embed.proj.weight": (d, 32, 1, 1), "patch_embed.proj.bias": (d,)}
  keys |= linear("time_embed.emb.timestep_embedder.linear_1", d, 256) | linear("time_embed.linear", 6 * d, d)
  keys |= linear("time_embed.emb.timestep_embedder.linear_2", d, d) | linear("proj_out", 32, d)
  keys |= linear("caption_projection.linear_1", d, 2304) | linear("caption_projection.linear_2", d, d)
  for i in range(20):
    block = f"transformer_blocks.{i}"
    keys[f"{block}.scale_shift_table"] = (6, d)
    keys |= {f"{block}.attn1.to_{x}.weight": (d, d) for x in "qkv"} | linear(f"{block}.attn1.to_out.0", d, d)
    for x in ("to_q", "to_k", "to_v", "to_out.0"):
      keys |= linear(f"{block}.attn2.{x}", d, d)
    keys |= {
      f"{block}.ff.conv_inverted.weight": (2 * hidden, d, 1, 1),
      f"{block}.ff.conv_inverted.bias": (2 * hidden,),
      f"{block}.ff.conv_depth.weight": (2 * hidden, 1, 3, 3),
      f"{block}.ff.conv_depth.bias": (2 * hidden,),
      f"{block}.ff.conv_point.weight": (d, hidden, 1, 1),
    }
  return keys


def test_published_tensors():
  specs = convert.reference_specs(rules.RULES, abstract(presets.SANA_1600M))
  sizes = {key: spec.shape for key, spec in specs.items()}
  own = {k.removeprefix("transformer.transformer."): v for k, v in sizes.items() if ".connector." not in k}
  assert own == published()
  assert (len(own), sum(map(math.prod, own.values()))) == (396, 1_604_462_752)
  connector = {k.removeprefix("transformer.connector."): v for k, v in sizes.items() if ".connector." in k}
  assert connector == {
    "0.weight": (2304, 1152),
    "0.bias": (2304,),
    "2.weight": (2304, 2304),
    "2.bias": (2304,),
    "3.weight": (2304,),
  }
