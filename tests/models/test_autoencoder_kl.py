"""The autoencoder against the recorded one, its weight table, and the folding of pixels into channels."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.errors import UserError
from blip3o_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, depth_to_space, space_to_depth
from blip3o_jax.porting.convert import reference_specs, to_ours, to_reference
from blip3o_jax.porting.rules.autoencoder_kl import RULES


def nhwc(x):
  return x.transpose(0, 2, 3, 1)


def abstract(cfg, size):
  init = lambda: AutoencoderKL(cfg).init(jax.random.key(0), jnp.zeros((1, size, size, cfg.in_channels)))
  return nn.unbox(jax.eval_shape(init))["params"]


@pytest.fixture(scope="module")
def recorded():
  g = load_golden("sdxl_decoder")
  cfg = AutoencoderKLConfig.from_reference(g.config["vae"])
  weights = {k.removeprefix("vae."): v for k, v in g.weights.items() if k.startswith("vae.")}
  return cfg, weights, to_ours(RULES, weights, abstract(cfg, 64)), g.io


def test_recorded_encoder_and_decoder(recorded):
  cfg, _, params, io = recorded
  vae = AutoencoderKL(cfg)
  run = lambda method, x: jax.jit(lambda p: vae.apply({"params": p}, x, method=method))(params)
  mean, logvar = run("encode", nhwc(io["vae_encode_in"]))
  images = run("decode", nhwc(io["vae_decode_in"]))
  assert relative_error(mean, nhwc(io["vae_mean"])) < 1e-4
  assert relative_error(logvar, nhwc(io["vae_logvar"])) < 1e-4
  assert relative_error(images, nhwc(io["vae_decode_out"])) < 1e-4


def test_weights_return_unchanged(recorded):
  _, weights, params, _ = recorded
  back = dict(to_reference(RULES, params))
  assert back.keys() == weights.keys()
  assert all(np.array_equal(back[k], weights[k]) for k in weights)


def test_old_attention_names(recorded):
  cfg, weights, params, _ = recorded
  names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

  def old(key):
    for new, name in names.items():
      key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
    return key

  renamed = {old(k): v for k, v in weights.items()}
  assert len(renamed.keys() - weights.keys()) == 16
  again = to_ours(RULES, renamed, abstract(cfg, 64))
  assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_published_size():
  params = abstract(AutoencoderKLConfig(), 64)
  assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == 83_653_863
  assert len(reference_specs(RULES, params)) == 248


def test_pixels_fold_by_row_column_channel():
  x = np.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
  folded = space_to_depth(x, 4)
  assert folded.shape == (2, 2, 2, 48)
  np.testing.assert_array_equal(folded[0, 1, 0, 3 * (4 * 2 + 3) + 1], x[0, 4 + 2, 3, 1])
  np.testing.assert_array_equal(depth_to_space(folded, 4), x)


def test_patches_shrink_the_latents():
  cfg = AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, patch_size=4)
  vae, images = AutoencoderKL(cfg), jnp.ones((1, 32, 32, 3))
  params = nn.unbox(jax.eval_shape(lambda: vae.init(jax.random.key(0), images)))
  mean, _ = jax.eval_shape(lambda p: vae.apply(p, images, method="encode"), params)
  assert cfg.downsampling == 8
  assert mean.shape == (1, 4, 4, 4)
  assert jax.eval_shape(lambda p, z: vae.apply(p, z, method="decode"), params, mean).shape == images.shape


def test_other_latents_are_refused():
  config = load_golden("sdxl_decoder").config["vae"]
  for change in ({"act_fn": "relu"}, {"latents_mean": [0.1] * 4}):
    with pytest.raises(UserError, match=next(iter(change))):
      AutoencoderKLConfig.from_reference(config | change)
