"""The decoding loop: recorded greedy answers, rows independent of each other, stop tokens, and the filters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.data.vision import pad_rows, rope_index
from blip3o_jax.errors import UserError
from blip3o_jax.inference.text import Sampling, filter_logits, generate_text
from blip3o_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig
from blip3o_jax.models.text_decoder import TextDecoder, TextDecoderConfig
from blip3o_jax.porting.convert import to_ours
from blip3o_jax.porting.rules import qwen2_5_vl, text_decoder


@functools.cache
def load(name):
  recording = load_golden(name)
  shapes = {k: v.shape for k, v in recording.weights.items()}
  if name.startswith("qwen2_5"):
    model, rules = Qwen25VL(Qwen25VLConfig.from_reference(recording.config, shapes)), qwen2_5_vl.RULES
  else:
    model, rules = TextDecoder(TextDecoderConfig.from_reference(recording.config, shapes)), text_decoder.RULES
  abstract = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), method="touch")["params"]))
  return model, to_ours(rules, recording.weights, abstract), recording.io


@pytest.mark.parametrize(
  ("name", "prompt", "answer"),
  [
    ("llama", "left", "left"),
    ("llama", "right", "left"),
    ("llama_rope_scaled", "left", "left"),
    ("qwen3", "left", "left"),
    ("qwen2_5_vl", "text_left", "text_left"),
    ("qwen2_5_vl", "text_right", "text_left"),
    ("qwen2_5_vl_tied", "text_left", "text_left"),
    ("qwen2_5_vl_tied", "text_right", "text_left"),
  ],
)
def test_greedy_recording(name, prompt, answer):
  """The same prompts padded on either side give the recorded tokens; the logits were recorded for Qwen2.5-VL."""
  model, params, io = load(name)
  ours = generate_text(
    model,
    params,
    io[f"{prompt}:input_ids"],
    io[f"{prompt}:attention_mask"],
    sampling=Sampling(max_new_tokens=12),
    keep_logits=True,
  )
  np.testing.assert_array_equal(ours.tokens, io[f"{answer}:greedy_new_tokens"])
  np.testing.assert_array_equal(ours.lengths, [12] * len(ours.tokens))
  if f"{answer}:greedy_step_logits" in io:
    assert relative_error(ours.logits, io[f"{answer}:greedy_step_logits"]) < 1e-4


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl_tied"])
def test_greedy_with_images(name):
  model, params, io = load(name)
  vision = pad_rows([(io["mm:pixel_values"], io["mm:image_grid_thw"])], window_size=model.cfg.vision.window_size)
  tokens, mask = io["mm:input_ids"], io["mm:attention_mask"]
  positions, _ = rope_index(tokens, mask, vision["grid_thw"], image_token=model.cfg.image_token)
  sampling = Sampling(max_new_tokens=12)
  ours = generate_text(
    model, params, tokens, mask, positions=positions, vision=vision, sampling=sampling, keep_logits=True
  )
  np.testing.assert_array_equal(ours.tokens, io["mm:greedy_new_tokens"])
  assert relative_error(ours.logits, io["mm:greedy_step_logits"]) < 1e-4


def test_sampled_rows_equal_their_own_batch_of_one():
  model, params, io = load("llama_rope_scaled")
  keys = jax.random.split(jax.random.key(7), 3)
  sampling = Sampling(max_new_tokens=6, temperature=1.5, top_k=50, top_p=0.95)
  together = generate_text(model, params, io["left:input_ids"], io["left:attention_mask"], sampling=sampling, keys=keys)
  row = 1
  mask = io["right:attention_mask"][row] > 0
  tokens = io["right:input_ids"][row, mask]
  alone = generate_text(model, params, [tokens], [mask[mask]], sampling=sampling, keys=keys[row : row + 1])
  np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
  other = generate_text(
    model,
    params,
    io["left:input_ids"],
    io["left:attention_mask"],
    sampling=sampling,
    keys=jax.random.split(jax.random.key(8), 3),
  )
  assert (together.tokens != other.tokens).any()


def test_stop_tokens():
  """A row ends at its first stop token and pads; the others go on unchanged; the loop ends when all have."""
  model, params, io = load("qwen2_5_vl")
  tokens, mask, want = io["text_left:input_ids"], io["text_left:attention_mask"], io["text_left:greedy_new_tokens"]
  stop = (int(want[0, 4]), int(want[1, 0]))
  ours = generate_text(
    model, params, tokens, mask, sampling=Sampling(max_new_tokens=12, stop_tokens=stop, pad_token=555)
  )
  np.testing.assert_array_equal(ours.lengths, [4, 0, 12])
  np.testing.assert_array_equal(ours.tokens[0], [*want[0, :5], *[555] * 7])
  np.testing.assert_array_equal(ours.tokens[1], [want[1, 0], *[555] * 11])
  np.testing.assert_array_equal(ours.tokens[2], want[2])
  assert ours.rows()[:2] == [want[0, :4].tolist(), []]


def test_top_k_of_one_is_greedy_and_settings_share_a_program():
  from blip3o_jax.inference import text

  model, params, io = load("llama_rope_scaled")
  prompt = io["left:input_ids"], io["left:attention_mask"]
  greedy = generate_text(model, params, *prompt, sampling=Sampling(max_new_tokens=6))
  before = text._advance._cache_size()
  keys = jax.random.split(jax.random.key(0), 3)
  sampling = Sampling(max_new_tokens=6, temperature=0.7, top_k=1)
  drawn = generate_text(model, params, *prompt, sampling=sampling, keys=keys)
  np.testing.assert_array_equal(drawn.tokens, greedy.tokens)
  assert text._advance._cache_size() == before


def reference_filter(logits, top_k, top_p):
  """transformers' TopKLogitsWarper, then TopPLogitsWarper, row by row."""
  out = logits.copy()
  for row in out:
    if top_k:
      row[row < np.sort(row)[-min(top_k, len(row))]] = -np.inf
    order = np.argsort(row)
    mass = np.cumsum(np.exp(row[order]) / np.exp(row).sum())
    drop = mass <= 1 - top_p
    drop[-1] = False
    row[order[drop]] = -np.inf
  return out


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (99, 0.5), (0, 0.7), (10, 0.6), (0, 1e-4)])
def test_filters(top_k, top_p):
  logits = np.random.default_rng(0).normal(0, 2, (4, 40)).astype(np.float32)
  ours = np.asarray(filter_logits(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p)))
  np.testing.assert_array_equal(ours, reference_filter(logits, top_k, top_p))


def test_errors():
  model, params, _ = load("llama_rope_scaled")
  tokens = np.ones((2, 3), int)
  with pytest.raises(UserError, match="prompt 1 is empty"):
    generate_text(model, params, tokens, [[1, 1, 1], [0, 0, 0]])
  with pytest.raises(UserError, match="keys"):
    generate_text(model, params, tokens, tokens, sampling=Sampling(temperature=1.0))
  with pytest.raises(UserError, match="top_p"):
    Sampling(top_p=1.5)
