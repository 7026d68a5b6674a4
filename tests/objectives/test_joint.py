"""Joint training: the weighted sum of both objectives' means, and that the backbone learns from both."""

import functools

import jax
import numpy as np
import pytest
import tiny

from blip3o_jax.objectives import generation, joint, understanding

VARIANT = "qwen3_siglip"


def batch():
  """Three rows to draw, two to answer, of which one is about a picture."""
  tokens, mask, positions = tiny.prompts([3, 5, 4], pad_to=6)
  drawn = {"tokens": tokens, "token_mask": mask, "positions": positions, "pixels": tiny.pixels(3)}
  tokens, mask, positions = tiny.prompts([8, 6], pad_to=8, seed=1)
  tokens[0, 1:5] = tiny.BACKBONES[VARIANT]["backbone"].image_token
  labels = np.where(mask & (np.arange(8) > 5), tokens, -100).astype(np.int32)
  labels[1, 3:6] = tokens[1, 3:6]
  images = tiny.pixels(2)[:, None, :8, :8]
  answered = {"tokens": tokens, "token_mask": mask, "positions": positions, "labels": labels, "images": images}
  return {"generation": drawn, "understanding": answered}


@functools.cache
def run(objective):
  """f(params, batch, cfg) -> ((loss of one row, sums), gradients), compiled once for each objective."""
  model = tiny.model(**tiny.VARIANTS[VARIANT])

  def value(params, batch, cfg):
    total, weight, sums = objective.loss(params, batch, jax.random.key(0), model=model, cfg=cfg)
    return total / weight, (weight, sums)

  return tiny.quick_jit(jax.value_and_grad(value, has_aux=True))


def test_the_sum_of_both_means():
  params = {name: tiny.params(0, VARIANT)[name] for name in joint.COMPONENTS}
  both = batch()
  weights = {"understanding_weight": 0.5, "generation_weight": 2.0}
  (value, (rows, sums)), grads = run(joint)(params, both, weights)
  model = tiny.model(**tiny.VARIANTS[VARIANT])
  settings = {"prefix_pass": False}
  alone = lambda objective, cfg: tiny.quick_jit(functools.partial(objective.loss, model=model, cfg=cfg))
  drawn = alone(generation, settings)(params, both["generation"], jax.random.key(0))
  said = alone(understanding, {})(params, both["understanding"], jax.random.key(0))
  assert rows == 5 and drawn[1] == 3 and said[1] == 5
  np.testing.assert_allclose(value, 2.0 * drawn[0] / 3 + 0.5 * said[0] / 5, rtol=1e-4)
  np.testing.assert_allclose(sums["generation"] / rows, drawn[0] / 3, rtol=1e-4)
  np.testing.assert_allclose(sums["understanding"] / rows, said[0] / 5, rtol=1e-4)
  np.testing.assert_allclose(sums["token_accuracy"] / rows, said[2]["token_accuracy"] / 5, rtol=1e-4)
  # Both reach the backbone; only drawing reaches queries and DiT, only answering the head's unseen rows and the tower.
  learns = lambda tree: any(np.asarray(g).any() for g in jax.tree.leaves(tree))
  assert all(learns(grads[name]) for name in ("backbone", "queries", "dit")) and not learns(grads["clip"])
  assert learns(grads["backbone"]["vision"]) and learns(grads["backbone"]["projector"])
  _, drawing = run(joint)(params, both, weights | {"understanding_weight": 0.0})
  assert not learns(drawing["backbone"]["projector"]) and learns(drawing["backbone"]["text"])
  _, answering = run(joint)(params, both, weights | {"generation_weight": 0.0})
  assert not learns(answering["dit"]) and not learns(answering["queries"]) and learns(answering["backbone"]["text"])


def test_settings_are_those_of_generation():
  from blip3o_jax import objectives
  from blip3o_jax.errors import UserError

  objectives.check("joint", {"drop": 0.1, "understanding_weight": 1.0}, {"backbone"})
  with pytest.raises(UserError, match="joint has no such setting"):
    objectives.check("joint", {"prefix_pass": True}, {"backbone"})
