"""The EVA-CLIP tower against the recording of the reference, and its published size."""

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
from blip3o_jax.models.eva_clip import EvaClip, EvaClipConfig, pool
from blip3o_jax.porting import convert
from blip3o_jax.porting.rules import eva_clip as rules


def build(remat="none"):
  golden = load_golden("eva_clip")
  cfg = EvaClipConfig.from_reference(golden.config, {k: v.shape for k, v in golden.weights.items()})
  model = EvaClip(dataclasses.replace(cfg, remat=remat))
  image = golden.io["image"].transpose(0, 2, 3, 1)
  abstract = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), image))["params"]
  return golden, model, abstract, convert.to_ours(rules.RULES, golden.weights, abstract), image


@pytest.fixture(scope="module")
def replayed():
  golden, model, _, params, image = build()
  features, state = jax.jit(lambda p, x: model.apply({"params": p}, x, mutable=["intermediates"]))(params, image)
  seen = state["intermediates"]
  return golden, {
    "features": features,
    "pooled": pool(features, model.cfg.pool_stride),
    "act_patch_embed": seen["patches"][0],
    "act_block0_attn": seen["layers"]["attention"][0][0],
    "act_block0_out_with_cls": seen["layers"]["block_out"][0][0],
  }


def test_every_recorded_array(replayed):
  golden, ours = replayed
  expected = {k: v for k, v in golden.io.items() if k != "image"}
  b, c = expected["pooled"].shape[:2]
  expected["pooled"] = expected["pooled"].reshape(b, c, -1).transpose(0, 2, 1)
  assert set(ours) == set(expected)
  errors = {k: relative_error(ours[k], expected[k]) for k in expected}
  assert max(errors.values()) < 1e-4, errors


def test_remat_changes_nothing(replayed):
  _, model, _, params, image = build(remat="full")
  features = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, image)
  assert relative_error(features, replayed[1]["features"]) < 1e-6


def test_weights_survive_the_way_there_and_back():
  golden, _, abstract, params, _ = build()
  back = dict(convert.to_reference(rules.RULES, params))
  assert set(back) == set(golden.weights)
  assert all(np.array_equal(back[k], golden.weights[k]) for k in back)
  # The original EVA-CLIP layout: separate biases, none for the keys.
  original = dict(golden.weights)
  for i in range(golden.config["vision_cfg"]["layers"]):
    q, _, v = np.split(original.pop(f"blocks.{i}.attn.qkv.bias"), 3)
    original |= {f"blocks.{i}.attn.q_bias": q, f"blocks.{i}.attn.v_bias": v}
  read = convert.to_ours(rules.RULES, original, abstract)["layers"]
  assert np.array_equal(read["v"]["bias"], params["layers"]["v"]["bias"]) and not read["k"]["bias"].any()


def test_patches_are_the_convolution():
  golden, model, _, params, image = build()
  kernel = jnp.asarray(golden.weights["patch_embed.proj.weight"]).transpose(2, 3, 1, 0)
  p = model.cfg.patch_size
  conv = jax.lax.conv_general_dilated(image, kernel, (p, p), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  conv = conv.reshape(image.shape[0], -1, conv.shape[-1]) + golden.weights["patch_embed.proj.bias"]
  assert relative_error(conv, golden.io["act_patch_embed"]) < 1e-4


def test_pooling_leaves_out_what_is_no_whole_square():
  """As torch.nn.functional.avg_pool2d does."""
  grid = jnp.arange(49.0).reshape(1, 49, 1)
  whole = np.arange(49.0).reshape(7, 7)[:6, :6].reshape(3, 2, 3, 2).mean(axis=(1, 3))
  assert np.array_equal(pool(grid, 2)[0, :, 0], whole.ravel())


def test_pooling_is_row_major():
  grid = jnp.arange(16.0).reshape(1, 16, 1)
  assert pool(grid, 2)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_fresh_post_norms_start_at_the_asked_gain():
  cfg = EvaClipConfig(image_size=16, patch_size=8, width=8, layers=2, heads=2, mlp_dim=16, norm_init=0.3)
  params = nn.unbox(jax.jit(EvaClip(cfg).init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3))))["params"]["layers"]
  assert np.allclose(params["norm1"]["scale"], 0.3) and np.allclose(params["norm2"]["scale"], 0.3)


@pytest.mark.parametrize("change", [{"postnorm": False}, {"rope": True}])
def test_other_kinds_of_the_same_names_are_refused(change):
  """EVA-CLIP g/14 has its norms before the branches, under the same keys."""
  golden = load_golden("eva_clip")
  config = golden.config | {"vision_cfg": golden.config["vision_cfg"] | change}
  for read in (
    lambda: EvaClipConfig.from_reference(config),
    lambda: EvaClipConfig.from_shapes({k: v.shape for k, v in golden.weights.items()}, config),
  ):
    with pytest.raises(UserError, match=next(iter(change))):
      read()


def test_published_size():
  cfg = presets.EVA_CLIP_E
  init = jax.eval_shape(EvaClip(cfg).init, jax.random.key(0), jnp.zeros((1, cfg.image_size, cfg.image_size, 3)))
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(init)) == 4_350_208_256
  specs = convert.reference_specs(rules.RULES, nn.unbox(init)["params"])
  assert len(specs) == 772 and specs["blocks.63.mlp.fc1.weight"].shape == (15360, 1792)
