"""Sana's autoencoder against the recorded one, its weight table, and the ways to change the size."""

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
from blip3o_jax.models.autoencoder_dc import (
  AutoencoderDC,
  AutoencoderDCConfig,
  DCLevel,
  Down,
  EfficientViTBlock,
  ResBlock,
  Up,
  pixel_shuffle,
  pixel_unshuffle,
)
from blip3o_jax.porting.convert import reference_specs, to_ours, to_reference
from blip3o_jax.porting.rules.autoencoder_dc import RULES


def nhwc(x):
  return x.transpose(0, 2, 3, 1)


def normal(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def abstract(cfg):
  side = cfg.downsampling
  init = lambda: AutoencoderDC(cfg).init(jax.random.key(0), jnp.zeros((1, side, side, cfg.in_channels)))
  return nn.unbox(jax.eval_shape(init))["params"]


@pytest.fixture(scope="module")
def recorded():
  g = load_golden("sana_decoder")
  cfg = AutoencoderDCConfig.from_reference(g.config["vae"])
  weights = {k.removeprefix("vae."): v for k, v in g.weights.items() if k.startswith("vae.")}
  return cfg, weights, to_ours(RULES, weights, abstract(cfg)), g.io


def test_recorded_encoder_and_decoder(recorded):
  cfg, _, params, io = recorded
  run = lambda method, x: jax.jit(lambda p: AutoencoderDC(cfg).apply({"params": p}, x, method=method))(params)
  assert relative_error(run("encode", nhwc(io["dcae_encode_in"])), nhwc(io["dcae_latent"])) < 1e-4
  latents = nhwc(io["dcae_scaled_latents"]) / cfg.scaling_factor
  assert relative_error(run("decode", latents), nhwc(io["dcae_decode_out"])) < 1e-4


def test_weights_return_unchanged(recorded):
  _, weights, params, _ = recorded
  back = dict(to_reference(RULES, params))
  assert back.keys() == weights.keys()
  assert all(np.array_equal(back[k], weights[k]) for k in weights)


def test_pixels_fold_by_channel_row_column():
  """Channel 4 c + 2 row + column, as torch's pixel_unshuffle."""
  x = normal(2, 4, 6, 3)
  folded = pixel_unshuffle(x)
  assert folded.shape == (2, 2, 3, 12)
  for c, row, column in ((0, 0, 0), (1, 0, 1), (2, 1, 0)):
    np.testing.assert_array_equal(folded[..., 4 * c + 2 * row + column], x[:, row::2, column::2, c])
  np.testing.assert_array_equal(pixel_shuffle(folded), x)


@pytest.mark.parametrize("unshuffle", [False, True])
def test_down(unshuffle):
  """A zero convolution leaves the shortcut: the mean of neighbouring channels after folding."""
  module, x = Down(features=8, unshuffle=unshuffle), normal(1, 4, 4, 4)
  params = nn.unbox(module.init(jax.random.key(0), x))["params"]
  assert params["conv"]["kernel"].shape == (3, 3, 4, 2 if unshuffle else 8)
  zero = jax.tree.map(jnp.zeros_like, params)
  shortcut = module.apply({"params": zero}, x)
  # 16 folded channels to 8: each is the mean of two pixels side by side.
  np.testing.assert_allclose(shortcut[0, ..., 3], x[0, 1::2].reshape(2, 2, 2, 4).mean(axis=2)[..., 1], rtol=1e-6)
  plain = Down(features=8, unshuffle=unshuffle, shortcut=False)
  assert not plain.apply({"params": zero}, x).any()
  one = {"conv": {"kernel": zero["conv"]["kernel"].at[1, 1, 2, 0].set(1.0), "bias": zero["conv"]["bias"]}}
  # Kernel of one: output 0 is input 2, at every second pixel or with its pixels folded into four channels.
  expected = pixel_unshuffle(x[..., 2:3]) if unshuffle else x[:, ::2, ::2, 2:3]
  np.testing.assert_array_equal(plain.apply({"params": one}, x)[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("shuffle", [False, True])
def test_up(shuffle):
  """A zero convolution leaves the shortcut: every channel repeated, then unfolded into pixels."""
  module, x = Up(features=4, shuffle=shuffle), normal(1, 2, 3, 8)
  params = nn.unbox(module.init(jax.random.key(0), x))["params"]
  assert params["conv"]["kernel"].shape == (3, 3, 8, 16 if shuffle else 4)
  zero = jax.tree.map(jnp.zeros_like, params)
  shortcut = module.apply({"params": zero}, x)
  # 8 channels twice each: the upper row of output channel 1 is input 2, the lower row input 3.
  np.testing.assert_array_equal(shortcut[0, ::2, :, 1], np.repeat(x[0, ..., 2], 2, axis=1))
  np.testing.assert_array_equal(shortcut[0, 1::2, :, 1], np.repeat(x[0, ..., 3], 2, axis=1))
  plain = Up(features=4, shuffle=shuffle, shortcut=False)
  one = {"conv": {"kernel": zero["conv"]["kernel"].at[1, 1, 5, 1].set(1.0), "bias": zero["conv"]["bias"]}}
  out = plain.apply({"params": one}, x)[0]
  if shuffle:  # folded channel 1 is the right pixel of the upper row of channel 0
    np.testing.assert_array_equal(out[::2, 1::2, 0], x[0, ..., 5])
    assert np.count_nonzero(out) == x[..., 5].size
  else:
    np.testing.assert_array_equal(out[..., 1], np.repeat(np.repeat(x[0, ..., 5], 2, axis=0), 2, axis=1))


@pytest.mark.parametrize("size", [2, 5])
def test_attention_at_two_scales(size):
  """As the reference lays it out, channels first: a head is any 3 K neighbouring channels of the concatenation. Up to K
  places it sums the other way round, to the same effect."""
  module, x = EfficientViTBlock(head_size=4, scales=(3, 5)), normal(2, size, size, 8)
  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32) / 2, shapes)
  params["mlp"] = jax.tree.map(np.zeros_like, params["mlp"])  # what is left of the second half is its norm's bias

  qkv = np.concatenate([x @ params[name]["kernel"] for name in "qkv"], axis=-1)
  parts = [qkv]
  for i, k in enumerate((3, 5)):
    conv = lambda x, kernel, pad, groups: jax.lax.conv_general_dilated(
      x, kernel, (1, 1), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    y = conv(qkv, params[f"scale_{i}_depthwise"]["kernel"], k // 2, 24)
    parts.append(conv(y, params[f"scale_{i}_kernel"][None, None], 0, 6))
  heads = np.concatenate(parts, axis=-1).transpose(0, 3, 1, 2).reshape(2, 6, 12, size * size)
  q, k, v = np.split(heads, 3, axis=2)
  scores = np.einsum("bgks,bgkl->bgsl", np.maximum(k, 0), np.maximum(q, 0))
  y = np.einsum("bgks,bgsl->bgkl", v, scores / (scores.sum(axis=2, keepdims=True) + 1e-15))
  y = y.reshape(2, 24, size, size).transpose(0, 2, 3, 1) @ params["out"]["kernel"]
  y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5) * params["out_norm"]["scale"] + params["out_norm"]["bias"]
  out = jax.jit(lambda p: module.apply({"params": p}, x))(params)
  assert relative_error(out, x + y + params["mlp_norm"]["bias"]) < 1e-4


def test_residual_block_with_relu():
  module, x = ResBlock(activation="relu"), normal(1, 3, 3, 4)
  params = nn.unbox(module.init(jax.random.key(0), x))["params"]
  params["conv1"] = {"kernel": jnp.zeros((3, 3, 4, 4)), "bias": jnp.full(4, -1.0)}
  assert np.array_equal(module.apply({"params": params}, x), x)  # relu(-1) = 0, where silu(-1) is not
  assert not np.array_equal(ResBlock(activation="silu").apply({"params": params}, x), x)


def test_a_first_level_without_blocks_is_folded_into_the_next():
  levels = (DCLevel(4, 0), DCLevel(8, 1), DCLevel(8, 1))
  cfg = AutoencoderDCConfig(levels, levels, latent_channels=2, unshuffle=True, shuffle=True)
  specs = {k: s.shape for k, s in reference_specs(RULES, abstract(cfg)).items()}
  assert specs["encoder.conv_in.conv.weight"] == (2, 3, 3, 3)
  assert specs["encoder.down_blocks.1.1.conv.weight"] == (2, 8, 3, 3)
  assert specs["decoder.up_blocks.1.0.conv.weight"] == (32, 8, 3, 3)
  assert specs["decoder.conv_out.conv.weight"] == (12, 8, 3, 3)
  assert not any(".0.0." in key for key in specs if "_blocks.0." in key)
  vae, images = AutoencoderDC(cfg), jnp.zeros((1, 8, 12, 3))
  latents = jax.eval_shape(lambda p: vae.apply({"params": p}, images, method="encode"), abstract(cfg))
  assert latents.shape == (1, 2, 3, 2)
  assert jax.eval_shape(lambda p: vae.apply({"params": p}, images), abstract(cfg)).shape == images.shape


def test_shortcuts_at_the_latents_can_be_absent(recorded):
  cfg, _, params, io = recorded
  plain = dataclasses.replace(cfg, encoder_out_shortcut=False, decoder_in_shortcut=False)
  zero = dict(
    params, encoder=dict(params["encoder"], conv_out=jax.tree.map(np.zeros_like, params["encoder"]["conv_out"]))
  )
  images = nhwc(io["dcae_encode_in"])
  encode = lambda cfg: jax.jit(lambda p: AutoencoderDC(cfg).apply({"params": p}, images, method="encode"))(zero)
  assert np.abs(encode(cfg)).max() > 0.1 and not encode(plain).any()


@pytest.mark.parametrize(
  "change, words",
  [
    ({"decoder_norm_types": "batch_norm"}, "norm 'batch_norm'"),
    ({"decoder_act_fns": ["silu", "silu", "mish"]}, "activation 'mish'"),
    ({"encoder_block_types": "TransformerBlock"}, "block 'TransformerBlock'"),
    ({"decoder_layers_per_block": [1, 1]}, "2 entries for 3 levels"),
    ({"decoder_conv_act_fn": "gelu"}, "decoder_conv_act_fn"),
  ],
)
def test_other_structures_are_refused(change, words):
  config = load_golden("sana_decoder").config["vae"]
  with pytest.raises(UserError, match=words):
    AutoencoderDCConfig.from_reference(config | change)


def test_both_spellings_of_the_size_changes():
  config = load_golden("sana_decoder").config["vae"]
  read = lambda **change: AutoencoderDCConfig.from_reference(config | change)
  assert not read().unshuffle and not read().shuffle  # "Conv", "interpolate"
  folded = read(downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle")
  assert folded.unshuffle and folded.shuffle and not read(downsample_block_type="conv").unshuffle


def test_published_size():
  """1.25 GB of float32 in the published file."""
  params = abstract(presets.DC_AE_F32C32)
  assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == 312_250_275
  specs = {k: s.shape for k, s in reference_specs(RULES, params).items()}
  assert presets.DC_AE_F32C32.downsampling == 32 and len(specs) == 375
  assert specs["encoder.down_blocks.5.2.attn.to_out.weight"] == (1024, 2048)
  assert specs["decoder.up_blocks.3.3.attn.to_qkv_multiscale.0.proj_out.weight"] == (1536, 32, 1, 1)
  assert specs["decoder.up_blocks.4.3.conv_out.conv_inverted.weight"] == (8192, 1024, 1, 1)
