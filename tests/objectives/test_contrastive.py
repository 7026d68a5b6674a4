"""Pictures against captions: the symmetric cross entropy, equal captions, and the three optional terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from blip3o_jax.objectives import contrastive

B, N, C, L, V = 4, 4, 6, 3, 12


class Fake:
  """Fixed embeddings; the read-out of the patches is off by one tenth everywhere. Keeps the noisy features it reads."""

  def __init__(self, pixels, scale=3.0):
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    self.features = rng.normal(1.0, 2.0, (B, N, C)).astype(np.float32)
    self.image, self.text = (unit(rng.normal(size=(B, 5))).astype(np.float32) for _ in "it")
    self.scale = scale
    # Tokens of a 2 x 2 grid, row by row, each with its own square of pixels, row by row.
    half = pixels.shape[1] // 2
    x = pixels.astype(np.float32) / 127.5 - 1
    squares = [x[:, i : i + half, j : j + half].reshape(B, -1) for i in (0, half) for j in (0, half)]
    self.patches = np.stack(squares, axis=1) + 0.1
    self.words = rng.normal(size=(B, L, V)).astype(np.float32)

  def apply(self, variables, *args, method):
    if method == "clip_features":
      return jnp.asarray(self.features)
    if method == "read_features":
      self.read = np.asarray(args[0])
      return jnp.asarray(self.words[:, : args[1].shape[1]]), jnp.asarray(self.patches)
    assert method == "contrastive_embeddings"
    np.testing.assert_array_equal(args[0], self.features)
    return jnp.asarray(self.image), jnp.asarray(self.text), self.scale


def run(tokens, mask=None, **cfg):
  pixels = tiny.pixels(B)
  model = Fake(pixels)
  mask = np.ones(np.shape(tokens), bool) if mask is None else mask
  batch = {"pixels": pixels, "tokens": jnp.asarray(tokens), "token_mask": jnp.asarray(mask)}
  total, weight, metrics = contrastive.loss({}, batch, jax.random.key(0), model=model, cfg=cfg)
  assert weight == B
  return model, total / weight, {k: v / weight for k, v in metrics.items()}


def log_softmax(x):
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_different_captions():
  """Radford et al. 2021, figure 3: labels on the diagonal, both ways."""
  model, loss, metrics = run(np.arange(B * L).reshape(B, L))
  logits = model.scale * model.image @ model.text.T
  want = -(np.diag(log_softmax(logits)).mean() + np.diag(log_softmax(logits.T)).mean()) / 2
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(axis=-1) == np.arange(B)).mean())


def test_equal_captions_are_positives_alike():
  """Rows 0 and 2 have the same caption: each picture of the two belongs half to either caption."""
  tokens = np.array([[1, 2], [1, 3], [1, 2], [4, 2]])
  target = np.eye(B)
  target[np.ix_([0, 2], [0, 2])] = 0.5
  model, loss, metrics = run(tokens)
  logits = model.scale * model.image @ model.text.T
  want = -sum((target * log_softmax(x)).sum(axis=-1).mean() for x in (logits, logits.T)) / 2
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  assert metrics["accuracy"] == np.mean([target[i, j] > 0 for i, j in enumerate(logits.argmax(axis=-1))])


def test_optional_terms():
  tokens = np.arange(B * L).reshape(B, L)
  mask = np.arange(L) < np.array([3, 2, 3, 1])[:, None]
  model, plain, metrics = run(tokens, mask)
  _, loss, _ = run(tokens, mask, moment_weight=0.5, caption_weight=3.0, pixel_weight=2.0)
  flat = model.features.reshape(-1, C).astype(np.float64)
  moment = np.mean(flat.mean(axis=0) ** 2 + (flat.std(axis=0) - 1) ** 2)
  np.testing.assert_allclose(metrics["moment"], moment, rtol=1e-4)
  np.testing.assert_allclose(metrics["pixel"], 0.01, rtol=1e-4)
  caption = -np.take_along_axis(log_softmax(model.words), tokens[..., None], axis=-1)[mask].mean()
  np.testing.assert_allclose(metrics["caption"], caption, rtol=1e-4)
  np.testing.assert_allclose(loss, plain + 0.5 * moment + 3.0 * caption + 2.0 * 0.01, rtol=1e-5)
  local = model.features.var(axis=1).mean() / model.features.var(axis=(0, 1)).mean()
  np.testing.assert_allclose(metrics["local"], local, rtol=1e-4)


def test_readers_see_features_on_the_way_to_noise():
  """Each picture at its own level: what is left of its features is 1 - sigma of them, 0 <= sigma <= 1."""
  model, _, _ = run(np.arange(B * L).reshape(B, L))
  x, y = (a.reshape(B, -1) for a in (model.features, model.read))
  kept = [np.polyfit(a - a.mean(), b, 1)[0] for a, b in zip(x, y, strict=True)]
  assert np.std(kept) > 0.1 and min(kept) > -0.5 and max(kept) < 1.5
  assert np.abs(x - y).mean() > 0.3


@pytest.mark.parametrize(
  ("cfg", "still"),
  [
    ({}, ["caption_in"] * 2 + ["patch_readout"] * 2),
    ({"pixel_weight": 1.0}, ["caption_in"] * 2),
    ({"caption_weight": 1.0}, ["patch_readout"] * 2),
  ],
)
def test_encoder_and_text_tower_learn(cfg, still):
  model, params = tiny.model(), tiny.params()
  tokens, mask, _ = tiny.prompts([3, 5], pad_to=6)
  batch = {"pixels": tiny.pixels(2), "tokens": tokens, "token_mask": mask}
  loss = lambda p: contrastive.loss(p, batch, jax.random.key(0), model=model, cfg=cfg)[0]
  value, grads = tiny.quick_jit(jax.value_and_grad(loss))({name: params[name] for name in contrastive.COMPONENTS})
  assert np.isfinite(value)
  zero = [path for path, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
  assert [path[1].key for path in zero] == still
