"""The UNet against the recorded one, its weight table, precomputed context, and the options of small decoders."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.errors import UserError
from blip3o_jax.models.unet import Transformer, UNet, UNetConfig
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


def init(cfg, size=4, tokens=4):
  return nn.unbox(UNet(cfg).init(jax.random.key(0), *inputs(cfg, 1, size, tokens)))["params"]


@pytest.fixture(scope="module")
def recorded():
  g = load_golden("sdxl_decoder")
  cfg = UNetConfig.from_reference(g.config["unet"])
  weights = {k.removeprefix("unet."): v for k, v in g.weights.items() if k.startswith("unet.")}
  params = to_ours(RULES, weights, jax.eval_shape(lambda: init(cfg, 8, 16)))
  io = g.io
  args = nhwc(io["unet_sample_in"]), io["unet_t"], io["unet_ehs"], io["text_embeds"], io["time_ids"].reshape(2, 6)
  return cfg, weights, params, args, nhwc(io["unet_out"])


@pytest.mark.parametrize("method", ["conv", "matmul"])
def test_recorded_forward(recorded, method):
  cfg, _, params, args, expected = recorded
  unet = UNet(dataclasses.replace(cfg, conv_method=method))
  assert relative_error(unet.apply({"params": params}, *args), expected) < 1e-4


def test_weights_return_unchanged(recorded):
  _, weights, params, _, _ = recorded
  back = dict(to_reference(RULES, params))
  assert back.keys() == weights.keys()
  assert all(np.array_equal(back[k], weights[k]) for k in weights)


def test_published_size():
  params = jax.eval_shape(lambda: init(UNetConfig(), 8, 64))
  assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == 2_525_520_644
  specs = reference_specs(RULES, params)
  assert len(specs) == 1680
  assert specs["add_embedding.linear_1.weight"].shape == (1280, 3328)
  assert specs["up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_v.weight"].shape == (1280, 1792)


@pytest.mark.parametrize("code", [False, True])
def test_projected_context_equals_plain(code):
  cfg = dataclasses.replace(TINY, position_code=code)
  unet, args, params = UNet(cfg), inputs(cfg), {"params": init(cfg)}
  plain = unet.apply(params, *args)
  projected = unet.apply(params, args[2], method="project")
  assert projected["down_1_attention_0"][0].shape == (2, 2, 4, 2, 8)  # depth, B, N, H, K
  ours = unet.apply(params, *args[:2], None, *args[3:], projected=projected)
  assert relative_error(ours, plain) < 1e-5


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_keeps_the_gradients(remat):
  params, args = init(TINY), inputs(TINY)

  def gradients(cfg):
    return jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(UNet(cfg).apply({"params": p}, *args)))))(params)

  ours, plain = gradients(dataclasses.replace(TINY, remat=remat)), gradients(TINY)
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain))
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()) < 1e-5 * scale, ours, plain)))


def test_a_time_for_each_row():
  unet, params, (x, t, *rest) = UNet(TINY), {"params": init(TINY)}, inputs(TINY)
  both = unet.apply(params, x, np.array([t, 900], np.float32), *rest)
  assert relative_error(both[0], unet.apply(params, x, t, *rest)[0]) < 1e-5
  assert relative_error(both[1], unet.apply(params, x, np.float32(900), *rest)[1]) < 1e-5
  assert relative_error(both[1], unet.apply(params, x, t, *rest)[1]) > 1e-3


@pytest.mark.parametrize("code", [False, True])
def test_the_code_tells_where_a_token_lies(code):
  cfg = dataclasses.replace(TINY, position_code=code)
  unet, params, (x, t, context, *rest) = UNet(cfg), {"params": init(cfg)}, inputs(cfg)
  moved = unet.apply(params, x, t, context[:, ::-1], *rest)
  assert (relative_error(moved, unet.apply(params, x, t, context, *rest)) > 1e-3) == code


@pytest.mark.parametrize("code", [False, True])
def test_the_code_tells_where_a_query_lies(code):
  cfg = dataclasses.replace(TINY, position_code=code)
  block, x, context = Transformer(cfg, 1, 2), jnp.ones((1, 2, 2, 16)), inputs(cfg, 1)[2]
  out = block.apply(nn.unbox(block.init(jax.random.key(0), x, context)), x, context).reshape(4, 16)
  assert (float(jnp.std(out, axis=0).max()) > 1e-3) == code


def test_key_kernels_start_as_query_kernels():
  params = init(dataclasses.replace(TINY, tie_query_key_init=True, depths=(1, 2)))
  same = lambda attention, a, b: np.array_equal(attention[a]["kernel"], attention[b]["kernel"])
  for name in ("down_1_attention_0", "mid_attention_0", "up_0_attention_1"):
    layers = params[name]["layers"]
    assert same(layers["cross_attention"], "q", "k")
    assert not same(layers["cross_attention"], "q", "v")
    assert not same(layers["self_attention"], "q", "k")
  deep = params["down_1_attention_0"]["layers"]["cross_attention"]["q"]["kernel"]
  assert not np.array_equal(deep[0], deep[1])
  narrow = params["down_0_attention_0"]["layers"]["cross_attention"]  # 8 channels, context of 16: stays independent
  assert narrow["q"]["kernel"].shape != narrow["k"]["kernel"].shape
  assert not same(init(TINY)["mid_attention_0"]["layers"]["cross_attention"], "q", "k")


def test_bad_requests():
  with pytest.raises(UserError, match="tie_query_key_init"):
    dataclasses.replace(TINY, tie_query_key_init=True, context_dim=12)
  with pytest.raises(UserError, match="one entry for each"):
    dataclasses.replace(TINY, heads=(1,))
  params = {"params": init(TINY)}
  x, *rest = inputs(TINY)
  with pytest.raises(UserError, match="cannot be halved"):
    UNet(TINY).apply(params, x[:, :3], *rest)
  with pytest.raises(UserError, match="square grid"):
    UNet(dataclasses.replace(TINY, position_code=True)).apply(params, x, rest[0], rest[1][:, :3], *rest[2:])


@pytest.mark.parametrize(
  "change", [{"class_embed_type": "timestep"}, {"use_linear_projection": False}, {"up_block_types": ["UpBlock2D"] * 3}]
)
def test_other_structures_are_refused(change):
  config = load_golden("sdxl_decoder").config["unet"]
  with pytest.raises(UserError, match=next(iter(change))):
    UNetConfig.from_reference(config | change)
