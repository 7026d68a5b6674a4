"""Drawing: noise by picture, both guided loops against loops written out here, and the last step to uint8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from helpers import relative_error

from blip3o_jax.errors import UserError
from blip3o_jax.inference import image

LENGTHS = [3, 16, 7]


@functools.cache
def call(method):
  model = tiny.model()
  return jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method))


def draw(prompt, pictures, *, seed=0, steps=3, guidance=3.0, **settings):
  keys = image.picture_keys(seed, np.asarray(pictures))
  settings |= {"steps": steps, "guidance": guidance}
  return np.asarray(image.draw_features(tiny.model(), tiny.params(), *prompt, keys, **settings))


@pytest.fixture(scope="module")
def drawn():
  return draw(tiny.prompts(LENGTHS, pad_to=16), [0, 1, 5])


# ---- noise


def test_noise_belongs_to_the_picture():
  """Bit for bit, whatever else is in the batch."""
  keys = image.picture_keys
  noise = lambda seed, pictures, draw=0: np.asarray(image.picture_noise(keys(seed, pictures), draw, (4, 4, 3)))
  batch = noise(7, np.arange(6))
  for pictures in ([4], [4, 0], [3, 4, 5]):
    np.testing.assert_array_equal(noise(7, np.asarray(pictures))[pictures.index(4)], batch[4])
  several = [
    batch,
    noise(8, np.arange(6)),
    noise(7, np.arange(6), 1),
    noise(7, np.arange(6), 2),
    noise(7, 6 + np.arange(6)),
  ]
  rows = np.concatenate(several).reshape(30, -1)
  assert len(np.unique(rows, axis=0)) == 30  # pictures, seeds and draws have noise of their own
  assert abs(rows.mean()) < 0.1 and abs(rows.std() - 1) < 0.1


# ---- features


def reference_features(prompt, noise, *, steps, guidance, exact, shift=1.0):
  """Spec 3.3 as it stands, one branch at a time."""
  params = tiny.params()
  condition = call("query_states")(params, *prompt)
  x = np.asarray(noise, np.float64)
  for i in range(steps):
    sigma, after = (shift * s / (1 + (shift - 1) * s) for s in (1 - i / steps, 1 - (i + 1) / steps))
    t = np.full(len(x), 1000 * sigma if exact else int(1000 * sigma), np.float32)
    velocity = lambda c, x=x, t=t: np.asarray(call("velocity")(params, np.float32(x), t, c), np.float64)
    null, cond = velocity(jnp.zeros_like(condition)), velocity(condition)
    x = x + (after - sigma) * (null + guidance * (cond - null))
  return np.stack([x[:, i, j] for i in range(2) for j in range(2)], axis=1)  # row-major


@pytest.mark.parametrize("exact", [False, True])
def test_guided_loop(drawn, exact):
  """Null = zeros, guided v = null + 3 (cond - null); times 1000, 666, 333 unless asked for exactly."""
  prompt, pictures = tiny.prompts(LENGTHS, pad_to=16), [0, 1, 5]
  noise = image.picture_noise(image.picture_keys(0, np.asarray(pictures)), 0, (2, 2, 16))
  want = reference_features(prompt, noise, steps=3, guidance=3.0, exact=exact)
  other = reference_features(prompt, noise, steps=3, guidance=3.0, exact=not exact)
  assert relative_error(want, other) > 1e-3  # so that the next line can tell them apart
  assert relative_error(draw(prompt, pictures, exact_times=True) if exact else drawn, want) < 1e-4


def test_guidance_one_is_the_condition_alone():
  prompt = tiny.prompts([5], pad_to=5)
  noise = image.picture_noise(image.picture_keys(0, np.asarray([2])), 0, (2, 2, 16))
  want = reference_features(prompt, noise, steps=2, guidance=1.0, exact=False)
  assert relative_error(draw(prompt, [2], steps=2, guidance=1.0), want) < 1e-4


def test_shift_moves_the_steps():
  prompt = tiny.prompts([5], pad_to=5)
  noise = image.picture_noise(image.picture_keys(0, np.asarray([2])), 0, (2, 2, 16))
  want = reference_features(prompt, noise, steps=3, guidance=3.0, exact=True, shift=4.0)
  assert relative_error(draw(prompt, [2], shift=4.0, exact_times=True), want) < 1e-4


def test_a_padded_row_equals_its_own_batch_of_one(drawn):
  tokens, mask, positions = tiny.prompts(LENGTHS, pad_to=16)
  row, n = 0, LENGTHS[0]
  alone = draw((tokens[row : row + 1, :n], mask[row : row + 1, :n], positions[row : row + 1, :, :n]), [0])
  assert relative_error(alone[0], drawn[row]) < 1e-4


def test_seed_decides(drawn):
  prompt = tiny.prompts(LENGTHS, pad_to=16)
  np.testing.assert_array_equal(draw(prompt, [0, 1, 5]), drawn)
  assert relative_error(draw(prompt, [0, 1, 5], seed=1), drawn) > 0.1
  assert relative_error(draw(prompt, [0, 2, 5])[1], drawn[1]) > 0.1


# ---- pixels


@functools.cache
def bright():
  """The tiny weights with a decoder of such contrast that pictures go beyond black and white."""
  params = dict(tiny.params())
  head = params["vae"]["decoder"]["conv_out"]
  head = {name: 2.0 * x for name, x in head.items()}
  params["vae"] = params["vae"] | {"decoder": params["vae"]["decoder"] | {"conv_out": head}}
  return params


def pixels(features, null, keys, *, steps=3, guidance=3.0):
  return np.asarray(image.draw_pixels(tiny.model(), bright(), features, null, keys, steps=steps, guidance=guidance))


@pytest.fixture(scope="module")
def scene():
  """(features, null, keys, pictures)."""
  rng = np.random.default_rng(3)
  features, null = rng.normal(size=(2, 2, 4, 16)).astype(np.float32)
  keys = image.picture_keys(0, np.asarray([0, 4]))
  return features, null, keys, pixels(features, null, keys)


def reference_pixels(features, null, keys, steps, guidance):
  """Spec 6.3 and 6.4 for v prediction, one branch at a time; float images, not yet clamped to 0..255."""
  params = bright()
  alpha = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
  times = np.arange(steps)[::-1] * (1000 // steps) + 1
  sigmas = np.append(np.sqrt((1 - alpha[times]) / alpha[times]), 0)
  x = np.asarray(image.picture_noise(keys, 2, (4, 4, 4)), np.float64) * np.sqrt(sigmas[0] ** 2 + 1)
  for i, t in enumerate(times):
    scaled = x / np.sqrt(sigmas[i] ** 2 + 1)
    run = lambda context, x=scaled, t=t: np.asarray(
      call("unet_predict")(params, np.float32(x), np.full(len(x), t, np.float32), context), np.float64
    )
    v, a = run(features), np.sqrt(alpha[t])
    if guidance > 1:
      empty = run(null)
      v = empty + guidance * (v - empty)
    epsilon = a * v + np.sqrt(1 - alpha[t]) * scaled
    x = x + epsilon * (sigmas[i + 1] - sigmas[i])
  return np.asarray(call("vae_decode")(params, np.float32(x)), np.float64) * 127.5 + 127.5


def test_decoder_loop_rounding_and_clamp(scene):
  features, null, keys, pictures = scene
  want = reference_pixels(features, null, keys, 3, 3.0)
  assert (want < -20).any() and (want > 275).any() and pictures.dtype == np.uint8
  error = np.abs(pictures.astype(float) - np.clip(want, 0, 255))
  assert error.max() < 0.52 and (pictures == 0).any() and (pictures == 255).any()


def test_a_picture_does_not_depend_on_its_neighbour(scene):
  features, null, keys, pictures = scene
  alone = pixels(features[1:], null[1:], keys[1:])
  assert np.abs(alone[0].astype(int) - pictures[1]).max() <= 1
  np.testing.assert_array_equal(pixels(features, null, keys), pictures)
  assert (pixels(features, null, image.picture_keys(1, np.asarray([0, 4]))) != pictures).mean() > 0.3


def test_guidance_up_to_one_never_looks_at_the_null(scene):
  features, null, keys, _ = scene
  plain = pixels(features, np.full_like(null, np.nan), keys, steps=2, guidance=1.0)
  want = reference_pixels(features, null, keys, 2, 1.0)
  assert np.abs(plain - np.clip(want, 0, 255)).max() < 0.52


# ---- the rest


def test_encoded_features_are_those_of_the_model():
  params, pictures = tiny.params(), tiny.pixels(2)
  features = image.encode_features(tiny.model(), params, pictures)
  assert features.shape == (2, 4, 16) and features.dtype == jnp.float32
  assert relative_error(features, call("clip_features")(params, pictures)) < 1e-5
  null = image.null_image_features(tiny.model(), params)
  assert null.shape == (1, 4, 16) and relative_error(null, call("null_clip_features")(params)) < 1e-5


def test_settings_that_cannot_be():
  for changes, words in [
    ({"steps": 0}, "steps are 0 and 50; take 1 to 1000"),
    ({"decoder_steps": -1}, "steps are 30 and -1"),
    ({"decoder_null": "black"}, "decoder_null 'black' is unknown"),
  ]:
    with pytest.raises(UserError, match=words):
      image.Sampling(**changes)
  release = image.Sampling()
  assert (release.steps, release.guidance, release.decoder_steps, release.decoder_guidance) == (30, 3.0, 50, 3.0)
  assert (release.exact_times, release.decoder_null, release.form) == (False, "generated", "inference")
