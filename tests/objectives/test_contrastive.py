"""Pictures against captions: the symmetric cross entropy, equal captions, and the two optional terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from blip3o_jax.objectives import contrastive

B, N, C = 4, 4, 6


class Fake:
  """Fixed embeddings; the read-out of the patches is off by one tenth everywhere."""

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

  def apply(self, variables, *args, method):
    if method == "clip_features":
      return jnp.asarray(self.features)
    assert method == "contrastive_embeddings"
    np.testing.assert_array_equal(args[0], self.features)
    return jnp.asarray(self.image), jnp.asarray(self.text), self.scale, jnp.asarray(self.patches)


def run(tokens, **cfg):
  pixels = tiny.pixels(B)
  model = Fake(pixels)
  batch = {"pixels": pixels, "tokens": jnp.asarray(tokens), "token_mask": jnp.ones(np.shape(tokens), bool)}
  total, weight, metrics = contrastive.loss({}, batch, None, model=model, cfg=cfg)
  assert weight == B
  return model, total / weight, {k: v / weight for k, v in metrics.items()}


def log_softmax(x):
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_different_captions():
  """Radford et al. 2021, figure 3: labels on the diagonal, both ways."""
  model, loss, metrics = run(np.arange(B * 3).reshape(B, 3))
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
  tokens = np.arange(B * 3).reshape(B, 3)
  model, plain, metrics = run(tokens)
  _, loss, _ = run(tokens, moment_weight=0.5, pixel_weight=2.0)
  flat = model.features.reshape(-1, C).astype(np.float64)
  moment = np.mean(flat.mean(axis=0) ** 2 + (flat.std(axis=0) - 1) ** 2)
  np.testing.assert_allclose(metrics["moment"], moment, rtol=1e-4)
  np.testing.assert_allclose(metrics["pixel"], 0.01, rtol=1e-4)
  np.testing.assert_allclose(loss, plain + 0.5 * moment + 2.0 * 0.01, rtol=1e-5)
  local = model.features.var(axis=1).mean() / model.features.var(axis=(0, 1)).mean()
  np.testing.assert_allclose(metrics["local"], local, rtol=1e-4)


@pytest.mark.parametrize(("cfg", "still"), [({}, ["patch_readout"] * 2), ({"pixel_weight": 1.0}, [])])
def test_encoder_and_text_tower_learn(cfg, still):
  model, params = tiny.model(), tiny.params()
  tokens, mask, _ = tiny.prompts([3, 5], pad_to=6)
  batch = {"pixels": tiny.pixels(2), "tokens": tokens, "token_mask": mask}
  loss = lambda p: contrastive.loss(p, batch, None, model=model, cfg=cfg)[0]
  value, grads = tiny.quick_jit(jax.value_and_grad(loss))({name: params[name] for name in contrastive.COMPONENTS})
  assert np.isfinite(value)
  zero = [path for path, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
  assert [path[1].key for path in zero] == still
