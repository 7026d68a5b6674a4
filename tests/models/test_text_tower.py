"""Captions and pictures in one space, and what can be read out of features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from blip3o_jax.models.text_decoder import TextDecoder
from blip3o_jax.models.text_tower import TextTower


@pytest.fixture(scope="module")
def tower():
  module = TextTower(tiny.config().text_tower)
  apply = jax.jit(lambda params, *args: module.apply({"params": params}, *args))
  features = np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32)
  return module, apply, tiny.params()["text_tower"], features


def test_against_the_formula(tower):
  """Text: the state of the last real token; picture: the norm of the mean token; both projected to unit length."""
  module, apply, params, features = tower
  tokens, mask, positions = tiny.prompts([3, 6], pad_to=6)
  image, text, scale = apply(params, features, tokens, mask)
  decoder = TextDecoder(module.cfg.text)

  @jax.jit
  def states(params, tokens, mask, positions):
    run = lambda *args, method: decoder.apply({"params": params}, *args, method=method)
    return run(run(tokens, method="embed"), positions, mask, method="decode").hidden

  hidden = np.asarray(states(params["text"], tokens, mask, positions[:, 0]))
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  want = unit(np.stack([hidden[0, 2], hidden[1, 5]]) @ params["text_proj"]["kernel"])
  np.testing.assert_allclose(text, want, atol=1e-5)
  mean = features.mean(axis=1)
  normed = (mean - mean.mean(axis=-1, keepdims=True)) / np.sqrt(mean.var(axis=-1, keepdims=True) + 1e-5)
  normed = normed * params["image_norm"]["scale"] + params["image_norm"]["bias"]
  np.testing.assert_allclose(image, unit(normed @ params["image_proj"]["kernel"]), atol=1e-4)
  np.testing.assert_allclose(scale, np.exp(params["logit_scale"]), rtol=1e-5)


def test_pixels_are_read_token_by_token(tower):
  module, _, params, features = tower
  pixels = module.apply({"params": params}, features, method="pixels")
  readout = features @ params["patch_readout"]["kernel"] + params["patch_readout"]["bias"]
  np.testing.assert_allclose(pixels, readout, atol=1e-4)


def test_a_caption_is_read_from_all_features_and_the_words_before(tower):
  module, _, params, features = tower
  tokens, mask, _ = tiny.prompts([3, 6], pad_to=6)
  read = jax.jit(lambda *args: module.apply({"params": params}, *args, method="caption_logits"))
  logits = read(features, tokens, mask)
  assert logits.shape == (2, 6, 640) and logits.dtype == np.float32
  differs = lambda features, tokens: np.abs(read(features, tokens, mask) - logits).max(axis=-1) > 1e-6
  later = tokens.copy()
  later[1, 3] += 1  # the fourth word is guessed without it, the fifth with it
  np.testing.assert_array_equal(differs(features, later)[1], [False] * 4 + [True] * 2)
  for i in range(features.shape[1]):
    other = features.copy()
    other[:, i] += 1
    assert differs(other, tokens)[mask].all()
  # Which token says it matters: the captioner knows where each lies.
  assert differs(features[:, ::-1], tokens)[mask].all()


def test_padding_is_not_read(tower):
  _, apply, params, features = tower
  tokens, mask, _ = tiny.prompts([3, 6], pad_to=6)
  other = np.where(mask, tokens, 5)
  text = lambda tokens: apply(params, features, tokens, mask)[1]
  np.testing.assert_allclose(text(tokens), text(other), atol=1e-6)


def test_the_scale_starts_at_cooling_of_007_and_ends_at_a_hundred(tower):
  module, apply, params, features = tower
  tokens, mask, _ = tiny.prompts([3, 6], pad_to=6)
  hot = params | {"logit_scale": jnp.float32(9.0)}
  np.testing.assert_allclose(apply(hot, features, tokens, mask)[2], 100.0, rtol=1e-5)
  init = jax.jit(lambda: module.init(jax.random.key(0), features, tokens, mask, method="touch")["params"])
  np.testing.assert_allclose(np.exp(init()["logit_scale"]), 1 / 0.07, rtol=1e-5)
