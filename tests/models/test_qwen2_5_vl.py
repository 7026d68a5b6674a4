"""Qwen2.5-VL against its recordings: vision tower, images among text, batches, and the exact weight table."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.data.vision import pad_rows, rope_index
from blip3o_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig, VisionConfig, place_image_features
from blip3o_jax.porting.convert import to_ours, to_reference
from blip3o_jax.porting.rules.qwen2_5_vl import RULES

NAMES = ["qwen2_5_vl", "qwen2_5_vl_tied"]


@functools.cache
def load(name):
  recording = load_golden(name)
  cfg = Qwen25VLConfig.from_reference(recording.config, {k: v.shape for k, v in recording.weights.items()})
  model = Qwen25VL(cfg)
  abstract = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), method="touch")["params"]))
  return model, to_ours(RULES, recording.weights, abstract), recording


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "mutable"))
def run(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


def images(recording, rows, extra=0):
  """The recorded images as a batch; `rows` lists the images of each row. The keys of patches, and grid_thw."""
  grid, pixels = recording.io["mm:image_grid_thw"], recording.io["mm:pixel_values"]
  pieces = np.split(pixels, np.cumsum(grid.prod(-1))[:-1])
  rows = [(np.concatenate([pieces[i] for i in row]), grid[row]) for row in rows]
  vision = VisionConfig.from_reference(recording.config["vision_config"])
  batch = pad_rows(rows, length=max(len(p) for p, _ in rows) + extra, window_size=vision.window_size)
  return batch, batch.pop("grid_thw")


@pytest.mark.parametrize("side", ["text_right", "text_left"])
@pytest.mark.parametrize("name", NAMES)
def test_text(name, side):
  model, params, recording = load(name)
  io = {key.removeprefix(f"{side}:"): value for key, value in recording.io.items() if key.startswith(side)}
  mask, positions = io["attention_mask"] > 0, np.moveaxis(io["position_ids"], 0, 1)
  x = run(model, params, io["input_ids"], method="embed")
  output, state = run(model, params, x, positions, mask, method="decode", mutable="intermediates")
  layer0 = state["intermediates"]["text"]["layers"]["block_out"][0][0]
  assert relative_error(layer0[mask], io["hidden_state_after_layer0"][mask]) < 1e-4
  assert relative_error(output.hidden[mask], io["last_hidden_state"][mask]) < 1e-4
  logits = run(model, params, output.hidden, method="logits")
  assert relative_error(logits[mask], io["logits"][mask]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_vision_tower(name):
  model, params, recording = load(name)
  io = recording.io
  batch, _ = images(recording, [[0, 1]], extra=8)
  features, state = run(model, params, **batch, method="vision", mutable="intermediates")
  blocks = len(io["mm:vision_embeds"])
  assert relative_error(features[0, :blocks], io["mm:vision_embeds"]) < 1e-4
  # The recordings are permuted, merge block by merge block, so that windows lie together.
  order = np.argsort(batch["patch_window"][0, : 4 * blocks : 4], kind="stable")
  out = np.asarray(state["intermediates"]["vision"]["layers"]["block_out"][0])[:, 0, : 4 * blocks]
  out = out.reshape(len(out), blocks, 4, -1)[:, order].reshape(len(out), 4 * blocks, -1)
  for layer, key in [(0, "block0_out"), (1, "block1_out"), (-1, "last_hidden")]:
    assert relative_error(out[layer], io[f"mm:vision_{key}_window_order"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_two_images_among_text(name):
  model, params, recording = load(name)
  io = recording.io
  batch, grid = images(recording, [[0, 1]], extra=4)
  mask = io["mm:attention_mask"] > 0
  positions, _ = rope_index(io["mm:input_ids"], mask, grid, image_token=model.cfg.image_token)
  x = run(model, params, io["mm:input_ids"], **batch, method="embed")
  hidden = run(model, params, x, positions, mask, method="decode").hidden
  assert relative_error(hidden, io["mm:last_hidden_state"]) < 1e-4
  assert relative_error(run(model, params, hidden, method="logits"), io["mm:logits"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_batch_of_rows_with_an_image_each(name):
  model, params, recording = load(name)
  io = recording.io
  batch, grid = images(recording, [[0], [1]])
  mask = io["mmbatch:attention_mask"] > 0
  positions, _ = rope_index(io["mmbatch:input_ids"], mask, grid, image_token=model.cfg.image_token)
  logits = run(model, params, io["mmbatch:input_ids"], positions, mask, **batch)
  assert relative_error(logits[mask], io["mmbatch:logits"][mask]) < 1e-4


def test_images_of_a_row_do_not_see_each_other():
  model, params, recording = load("qwen2_5_vl")
  both, _ = images(recording, [[0, 1]])
  apart, _ = images(recording, [[0], [1]])
  both, apart = (run(model, params, **batch, method="vision") for batch in (both, apart))
  first = 6 * 10 // 4
  assert relative_error(both[0, :first], apart[0, :first]) < 1e-5
  assert relative_error(both[0, first:], apart[1, : both.shape[1] - first]) < 1e-5


def test_place_image_features():
  embeddings, features = jnp.zeros((2, 5, 1)), jnp.asarray([[[1.0], [2.0]], [[3.0], [4.0]]])
  is_image = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool)
  placed = place_image_features(embeddings, is_image, features)
  np.testing.assert_array_equal(placed[..., 0], [[0, 1, 0, 2, 0], [3, 0, 0, 0, 0]])


@pytest.mark.parametrize("name", NAMES)
def test_flat_config_says_the_same(name):
  recording = load_golden(name)
  flat = json.loads((recording.path / "config_flat.json").read_text())
  assert Qwen25VLConfig.from_reference(flat) == Qwen25VLConfig.from_reference(recording.config) == load(name)[0].cfg


@pytest.mark.parametrize("name", NAMES)
def test_weights_round_trip_and_newer_names(name):
  model, params, recording = load(name)
  back = dict(to_reference(RULES, params))
  assert back.keys() == recording.weights.keys()
  for key, value in recording.weights.items():
    np.testing.assert_array_equal(back[key], value)
  newer = {
    key.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1): value
    for key, value in recording.weights.items()
  }
  jax.tree.map(np.testing.assert_array_equal, to_ours(RULES, newer, params), params)


def test_published_sizes():
  """Parameter counts of spec 10.4, vocabulary 151,668."""
  from blip3o_jax.models.presets import QWEN_3B, QWEN_7B

  for cfg, want in [(QWEN_7B, 8_289_328_128), (QWEN_3B, 3_754_074_112)]:
    params = nn.unbox(jax.eval_shape(lambda cfg=cfg: Qwen25VL(cfg).init(jax.random.key(0), method="touch")["params"]))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == want
