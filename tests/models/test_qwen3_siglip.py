"""Qwen3 with SigLIP2: both parts against their own recordings through the whole module, the projector, the places of
images, and the weight table."""

import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.inference.text import Sampling, generate_text
from blip3o_jax.models import presets
from blip3o_jax.models.qwen3_siglip import Projector, Qwen3Siglip, Qwen3SiglipConfig
from blip3o_jax.porting.convert import to_ours, to_reference
from blip3o_jax.porting.rules.qwen3_siglip import RULES

IMAGE = 299  # an id that the recorded prompts do not hold


@functools.cache
def load():
  """Recorded Qwen3 and SigLIP with a random projector between: (model, parameters, checkpoint)."""
  text, tower, rng = load_golden("qwen3"), load_golden("siglip"), np.random.default_rng(0)
  width, dim = tower.config["hidden_size"], text.config["hidden_size"]
  projector = {"0.weight": (dim, width), "0.bias": (dim,), "2.weight": (dim, dim), "2.bias": (dim,)}
  weights = dict(text.weights)
  weights |= {f"model.vision_tower.vision_tower.{key}": value for key, value in tower.weights.items()}
  weights |= {f"model.mm_projector.{k}": rng.normal(size=s).astype(np.float32) / 4 for k, s in projector.items()}
  config = text.config | {"vision_config": tower.config, "image_token_id": IMAGE}
  cfg = Qwen3SiglipConfig.from_reference(config, {key: value.shape for key, value in weights.items()})
  model = Qwen3Siglip(cfg)
  return model, to_ours(RULES, weights, abstract(model)), weights


def abstract(model):
  return nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), method="touch")["params"]))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "mutable"))
def run(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


def recorded_images():
  """[B, S, S, 3], B > 1."""
  return load_golden("siglip").io["pixel_values"].transpose(0, 2, 3, 1)


def projected(weights, x):
  """mlp2x_gelu in numpy: [N, W] -> [N, D]."""
  linear = lambda x, k: x @ weights[f"model.mm_projector.{k}.weight"].T + weights[f"model.mm_projector.{k}.bias"]
  y = linear(x.astype(np.float64), 0)
  return linear(y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2))), 2)


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_is_the_recorded_qwen3_without_parameters_of_vision(side):
  model, params, _ = load()
  io = {k.removeprefix(f"{side}:"): v for k, v in load_golden("qwen3").io.items() if k.startswith(side)}
  mask, params = io["attention_mask"] > 0, {"text": params["text"]}
  x = run(model, params, io["input_ids"], method="embed")
  hidden = run(model, params, x, io["position_ids"], mask, method="decode").hidden
  assert relative_error(hidden[mask], io["last_hidden_state"][mask]) < 1e-4
  logits = run(model, params, io["input_ids"], io["position_ids"], mask)
  assert relative_error(logits[mask], io["logits"][mask]) < 1e-4


def test_greedy_tokens_are_recorded_ones():
  model, params, _ = load()
  io = {k.removeprefix("left:"): v for k, v in load_golden("qwen3").io.items() if k.startswith("left:")}
  sampling = Sampling(max_new_tokens=io["greedy_new_tokens"].shape[1])
  answer = generate_text(model, {"text": params["text"]}, io["input_ids"], io["attention_mask"] > 0, sampling=sampling)
  np.testing.assert_array_equal(answer.tokens, io["greedy_new_tokens"])


def test_vision_is_the_recorded_tower_after_its_last_norm_and_a_projector():
  model, params, weights = load()
  images, want = recorded_images(), load_golden("siglip").io["last_hidden_state"]
  assert len(images) > 1
  tower = run(model, params, images, method=lambda model, x: model.vision_tower(x).last_hidden_state)
  assert relative_error(tower, want) < 1e-4
  want = np.stack([projected(weights, x) for x in want])
  one_a_row = run(model, params, images[:, None], method="vision")
  assert relative_error(one_a_row, want) < 1e-4
  in_one_row = run(model, params, images[None], method="vision")
  assert relative_error(in_one_row, want.reshape(1, -1, want.shape[-1])) < 1e-4


def test_projector_has_the_exact_gelu():
  """The tanh form differs by 5e-4 at most: the inputs lie where it does, the outer layer is the identity."""
  x = np.linspace(-3, 3, 64, dtype=np.float32).reshape(16, 4)
  eye = {"kernel": np.eye(4, dtype=np.float32), "bias": np.zeros(4, np.float32)}
  ours = Projector(4).apply({"params": {"fc1": eye, "fc2": eye}}, x)
  want = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  np.testing.assert_allclose(ours, want, atol=1e-5)


def test_image_tokens_become_their_own_rows_images_in_order():
  """Three rows with two, no and one picture; padding of rows with fewer is never read, nor are other tokens touched."""
  model, params, weights = load()
  images, n = recorded_images(), model.cfg.vision.side**2
  first, second = (projected(weights, x) for x in load_golden("siglip").io["last_hidden_state"][:2])
  row = lambda *ids: np.pad(np.asarray(ids), (0, 2 * n + 4 - len(ids)))
  tokens = np.stack([row(5, *[IMAGE] * n, 6, 7, *[IMAGE] * n), row(8, 9), row(10, 11, *[IMAGE] * n, 12)])
  noise = np.full_like(images[0], 1e3)
  pixels = np.stack([[images[1], images[0]], [noise, noise], [images[0], noise]])
  x = np.asarray(run(model, params, tokens, pixels, method="embed"))
  want = np.asarray(load_golden("qwen3").weights["model.embed_tokens.weight"])[tokens].astype(np.float64)
  want[0, 1 : n + 1], want[0, n + 3 : 2 * n + 3] = second, first
  want[2, 2 : n + 2] = first
  for b in range(3):
    assert relative_error(x[b], want[b]) < 1e-4
  plain = run(model, params, tokens, method="embed")
  np.testing.assert_array_equal(plain[1], x[1])
  assert relative_error(plain[0], want[0]) > 0.1


def test_answers_about_pictures_do_not_depend_on_padding():
  """Greedy tokens of a padded row with a picture, beside a longer one without, are those of the row alone."""
  model, params, _ = load()
  n = model.cfg.vision.side**2
  rows = [[5, *[IMAGE] * n, 6, 7], [8, *[9] * n, 10, 11, 12, 13]]
  images = recorded_images()[:1]
  sampling = Sampling(max_new_tokens=4)

  def answer(rows, images):
    length = max(map(len, rows))
    tokens = np.asarray([[0] * (length - len(row)) + row for row in rows])
    mask = np.arange(length) >= length - np.asarray([[len(row)] for row in rows])
    return generate_text(model, params, tokens, mask, vision={"images": images}, sampling=sampling, keep_logits=True)

  both = answer(rows, np.stack([images, np.zeros_like(images)]))
  alone = answer(rows[:1], images[None])
  np.testing.assert_array_equal(both.tokens[0], alone.tokens[0])
  assert relative_error(both.logits[0], alone.logits[0]) < 1e-4
  blind = answer(rows[:1], np.zeros_like(images)[None])
  assert relative_error(blind.logits[0, 0], both.logits[0, 0]) > 0.01


def test_weights_round_trip_in_both_spellings():
  model, params, weights = load()
  back = dict(to_reference(RULES, params))
  assert back.keys() == weights.keys()
  for key, value in weights.items():
    np.testing.assert_array_equal(back[key], value)
  shorter = {key.replace("vision_tower.vision_tower.", "vision_tower."): value for key, value in weights.items()}
  assert shorter.keys() != weights.keys()
  jax.tree.map(np.testing.assert_array_equal, to_ours(RULES, shorter, params), params)


def test_a_tower_without_pooling_head():
  """A model that declines it passes its weights over; nothing else changes."""
  model, params, weights = load()
  bare = {key: value for key, value in weights.items() if ".head." not in key}
  cfg = Qwen3SiglipConfig.from_reference(model.cfg.to_reference(), {key: value.shape for key, value in bare.items()})
  assert not cfg.vision.head and model.cfg.vision.head
  for some in (bare, weights):
    read = to_ours(RULES, some, abstract(Qwen3Siglip(cfg)))
    images = recorded_images()[None]
    np.testing.assert_array_equal(
      run(Qwen3Siglip(cfg), read, images, method="vision"), run(model, params, images, method="vision")
    )


def test_config_there_and_back():
  cfg = load()[0].cfg
  assert Qwen3SiglipConfig.from_reference(cfg.to_reference()) == cfg
  # The branch says nothing of its tower but its name: SigLIP2-so400m/16 at 512 pixels.
  reference = presets.QWEN3_SIGLIP2.to_reference()
  silent = {key: value for key, value in reference.items() if key not in ("vision_config", "image_token_id")}
  found = Qwen3SiglipConfig.from_reference(silent).to_reference()
  assert found == reference | {"vision_config": reference["vision_config"] | {"vision_use_head": True}}
