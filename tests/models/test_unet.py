"""The UNet against the recorded one, its weight table, precomputed context, and the options of small decoders."""

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
from blip3o_jax.models.unet import Transformer, UNet, UNetConfig
from blip3o_jax.nn.embeddings import grid_code
from blip3o_jax.porting.convert import reference_specs, to_ours, to_reference
from blip3o_jax.porting.rules.unet import RULES

TINY = UNetConfig(
  block_out_channels=(8, 16),
  layers_per_block=1,
  depths=(0, 2),
  mid_depth=1,
  heads=(1, 2),
  context_dim=16,
  time_id_size=4,
  norm_groups=4,
)


def nhwc(x):
  return x.transpose(0, 2, 3, 1)


def inputs(cfg, batch=2, size=4, tokens=4):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  context = normal(batch, tokens, cfg.context_dim)
  sizes = np.tile(np.array([64, 64, 0, 0, 64, 64], np.int32), (batch, 1))
  return normal(batch, size, size, cfg.in_channels), np.float32(500), context, context.mean(1), sizes


def abstract(cfg, size=4, tokens=4):
  return nn.unbox(jax.eval_shape(lambda: UNet(cfg).init(jax.random.key(0), *inputs(cfg, 1, size, tokens))))["params"]


def random_params(cfg):
  """Any weights will do, and numpy draws them much faster than XLA compiles an initialisation."""
  rng = np.random.default_rng(1)
  draw = lambda p: (rng.normal(size=p.shape) / np.sqrt(math.prod(p.shape[:-1]) or 1)).astype(np.float32)
  return jax.tree.map(draw, abstract(cfg))


@functools.partial(jax.jit, static_argnums=0)
def predict(cfg, params, *args, **kwargs):
  return UNet(cfg).apply({"params": params}, *args, **kwargs)


@pytest.fixture(scope="module")
def recorded():
  g = load_golden("sdxl_decoder")
  cfg = UNetConfig.from_reference(g.config["unet"])
  weights = {k.removeprefix("unet."): v for k, v in g.weights.items() if k.startswith("unet.")}
  params = to_ours(RULES, weights, abstract(cfg, 8, 16))
  io = g.io
  args = nhwc(io["unet_sample_in"]), io["unet_t"], io["unet_ehs"], io["text_embeds"], io["time_ids"].reshape(2, 6)
  return cfg, weights, params, args, nhwc(io["unet_out"])


def test_recorded_forward(recorded):
  cfg, _, params, args, expected = recorded
  assert relative_error(predict(cfg, params, *args), expected) < 1e-4


def test_weights_return_unchanged(recorded):
  _, weights, params, _, _ = recorded
  back = dict(to_reference(RULES, params))
  assert back.keys() == weights.keys()
  assert all(np.array_equal(back[k], weights[k]) for k in weights)


def test_published_size():
  params = abstract(UNetConfig(), 8, 64)
  assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == 2_525_520_644
  specs = reference_specs(RULES, params)
  assert len(specs) == 1680
  assert specs["add_embedding.linear_1.weight"].shape == (1280, 3328)
  assert specs["up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_v.weight"].shape == (1280, 1792)


@pytest.mark.parametrize("code", [False, True])
def test_projected_context_equals_plain(code):
  cfg = dataclasses.replace(TINY, position_code=code)
  args, params = inputs(cfg), random_params(cfg)
  plain = predict(cfg, params, *args)
  projected = UNet(cfg).apply({"params": params}, args[2], method="project")
  assert projected["down_1_attention_0"][0].shape == (2, 2, 4, 2, 8)  # depth, B, N, H, K
  ours = predict(cfg, params, *args[:2], None, *args[3:], projected=projected)
  assert relative_error(ours, plain) < 1e-5


@pytest.mark.parametrize("remat, wrapped", [("none", 0), ("full", 9), ("dots", 9)])
def test_remat_wraps_every_block(remat, wrapped):
  """8 residual blocks (2 levels down, the middle's 2, 2 x 2 up) and the layer inside the transformer's scan."""
  cfg = dataclasses.replace(TINY, depths=(0, 0), remat=remat)
  traced = jax.make_jaxpr(lambda p: UNet(cfg).apply({"params": p}, *inputs(cfg)))(abstract(cfg))
  assert str(traced).count("policy=") == wrapped


def test_a_time_for_each_row():
  params, (x, t, *rest) = random_params(TINY), inputs(TINY)
  both = predict(TINY, params, x, np.array([t, 900], np.float32), *rest)
  assert relative_error(both[0], predict(TINY, params, x, t, *rest)[0]) < 1e-5
  assert relative_error(both[1], predict(TINY, params, x, np.float32(900), *rest)[1]) < 1e-5
  assert relative_error(both[1], predict(TINY, params, x, t, *rest)[1]) > 1e-3


@pytest.mark.parametrize("code", [False, True])
def test_the_code_tells_where_a_token_lies(code):
  cfg = dataclasses.replace(TINY, position_code=code)
  params, (x, t, context, *rest) = random_params(cfg), inputs(cfg)
  moved = predict(cfg, params, x, t, context[:, ::-1], *rest)
  assert (relative_error(moved, predict(cfg, params, x, t, context, *rest)) > 1e-3) == code


def test_a_coarse_code_resembles_the_fine_ones_inside_its_cell():
  fine, coarse = grid_code(8, 8, 96), grid_code(4, 4, 96)
  likeness = (coarse @ fine.T).reshape(4, 4, 4, 2, 4, 2)  # coarse row, column; fine row in two, column in two
  by_cell = likeness.transpose(0, 1, 2, 4, 3, 5).reshape(16, 16, 4)
  own = np.eye(16, dtype=bool)
  assert by_cell[own].min() > by_cell[~own].max()


@pytest.mark.parametrize("code", [False, True])
def test_the_code_tells_where_a_query_lies(code):
  cfg = dataclasses.replace(TINY, position_code=code)
  block, x, context = Transformer(cfg, 1, 2), jnp.ones((1, 2, 2, 16)), inputs(cfg, 1)[2]
  out = nn.unbox(block.init_with_output(jax.random.key(0), x, context))[0].reshape(4, 16)
  assert (float(jnp.std(out, axis=0).max()) > 1e-3) == code


def test_key_kernels_start_as_query_kernels():
  def attentions(width, tie):
    cfg = dataclasses.replace(TINY, tie_query_key_init=tie)
    block = Transformer(cfg, 2, 2)
    params = nn.unbox(block.init(jax.random.key(0), jnp.ones((1, 2, 2, width)), jnp.ones((1, 4, 16))))["params"]
    kernel = lambda attention, x: params["layers"][attention][x]["kernel"]
    return {x: kernel("cross_attention", x) for x in "qkv"}, {x: kernel("self_attention", x) for x in "qkv"}

  cross, own = attentions(16, tie=True)
  assert np.array_equal(cross["q"], cross["k"])
  assert not np.array_equal(cross["q"], cross["v"])
  assert not np.array_equal(own["q"], own["k"])
  assert not np.array_equal(cross["q"][0], cross["q"][1])  # each layer draws its own
  assert not np.array_equal(*[attentions(16, tie=False)[0][x] for x in "qk"])
  narrow, _ = attentions(8, tie=True)  # a level of another width stays independent
  assert narrow["q"].shape != narrow["k"].shape


def test_odd_sizes_come_back():
  """Halved upwards; the doubled picture is cut to what it was before the convolution (spec 6.4: any multiple of 8)."""
  x, *rest = inputs(TINY)
  odd = jnp.concatenate([x, x], axis=1)[:, :7, :5]
  out = UNet(TINY).apply({"params": random_params(TINY)}, odd, *rest)
  assert out.shape == (*odd.shape[:3], TINY.out_channels) and np.isfinite(out).all()


def test_bad_requests():
  with pytest.raises(UserError, match="tie_query_key_init"):
    dataclasses.replace(TINY, tie_query_key_init=True, context_dim=12)
  with pytest.raises(UserError, match="one entry for each"):
    dataclasses.replace(TINY, heads=(1,))
  params = {"params": random_params(TINY)}
  x, *rest = inputs(TINY)
  with pytest.raises(UserError, match="square grid"):
    UNet(dataclasses.replace(TINY, position_code=True)).apply(params, x, rest[0], rest[1][:, :3], *rest[2:])


@pytest.mark.parametrize(
  "change",
  [
    {"class_embed_type": "timestep"},
    {"use_linear_projection": False},
    {"up_block_types": ["UpBlock2D"] * 3},
    {"resnet_skip_time_act": True},
    {"downsample_padding": 0},
  ],
)
def test_other_structures_are_refused(change):
  config = load_golden("sdxl_decoder").config["unet"]
  with pytest.raises(UserError, match=next(iter(change))):
    UNetConfig.from_reference(config | change)


def test_what_a_file_does_not_say_is_as_diffusers_has_it():
  config = load_golden("sdxl_decoder").config["unet"]
  cfg = UNetConfig.from_reference(config)
  short = {key: value for key, value in config.items() if key not in ("in_channels", "layers_per_block", "norm_eps")}
  assert UNetConfig.from_reference(short | {"center_input_sample": None}) == cfg


@pytest.mark.parametrize("depths", [(1, 2), (1, 0), (0, 2)])
def test_the_file_says_the_depth_of_the_middle(depths):
  """diffusers takes it from the last level, which may have no attention of its own."""
  cfg = dataclasses.replace(TINY, depths=depths, mid_depth=2)
  assert UNetConfig.from_reference(cfg.to_reference(8)) == cfg
  with pytest.raises(UserError, match="here they are 3 and 2"):
    dataclasses.replace(cfg, depths=(1, 2), mid_depth=3).to_reference(8)
