"""Cross entropy of the next token: shifted by one, over labelled tokens only, a sum and its count."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from blip3o_jax.data import vision
from blip3o_jax.objectives import understanding


class Fake:
  def __init__(self, logits):
    self.logits = logits

  def apply(self, variables, batch, *, method):
    assert method == "understand"
    return self.logits


def run(logits, labels):
  return understanding.loss({}, {"labels": jnp.asarray(labels)}, None, model=Fake(jnp.asarray(logits)), cfg={})


def test_formula():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (2, 5, 7)).astype(np.float32)
  labels = np.array([[3, -100, 2, 6, -100], [-100, -100, -100, 0, 4]])
  total, weight, metrics = run(logits, labels)
  want, hits, count = 0.0, 0, 0
  for b in range(2):
    for i in range(4):  # the output at i tells the token at i + 1; the first label has nothing before it
      label = labels[b, i + 1]
      if label != -100:
        row = logits[b, i].astype(np.float64)
        want += np.log(np.exp(row).sum()) - row[label]
        hits, count = hits + (row.argmax() == label), count + 1
  assert count == 4
  np.testing.assert_allclose(total, want, rtol=1e-5)
  assert weight == 4 and metrics["token_accuracy"] == hits


def test_accuracy_counts_only_labelled_tokens():
  logits = np.zeros((1, 3, 4), np.float32)
  logits[..., 2] = 5
  _, weight, metrics = run(logits, [[-100, 2, -100]])
  assert (weight, metrics["token_accuracy"]) == (1, 1)


def test_nothing_to_say_is_zero_and_finite():
  total, weight, _ = run(np.full((1, 3, 4), 1e4, np.float32), np.full((1, 3), -100))
  assert (total, weight) == (0, 0)


def test_every_part_of_the_backbone_learns():
  model, params = tiny.model(), tiny.params()["backbone"]
  cfg = model.cfg.backbone
  tokens, mask, _ = tiny.prompts([7], pad_to=8)
  tokens[0, 1:5] = cfg.image_token
  processor = vision.ImageProcessor(patch_size=8, min_pixels=32 * 32, max_pixels=32 * 32)
  vision_batch = vision.pad_rows([(processor(tiny.pixels(1)[0])[0], [[1, 4, 4]])], window_size=16, patch_size=8)
  positions, _ = vision.rope_index(tokens, mask, vision_batch["grid_thw"], image_token=cfg.image_token)
  labels = np.where(np.arange(8) == 6, tokens, -100)
  batch = {"tokens": tokens, "token_mask": mask, "labels": labels, "positions": positions, **vision_batch}
  loss = lambda p: understanding.loss({"backbone": p}, batch, None, model=model, cfg={})[0]
  value, grads = tiny.quick_jit(jax.value_and_grad(loss))(params)
  assert np.isfinite(value)
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
  assert still == []
