"""Regression on CLIP features: the formula, and who learns."""

import jax
import numpy as np
import pytest
import tiny

from blip3o_jax.errors import UserError
from blip3o_jax.objectives import generation, regression


def batch():
  tokens, mask, positions = tiny.prompts([3, 5], pad_to=6)
  return {"tokens": tokens, "token_mask": mask, "positions": positions, "pixels": tiny.pixels(2)}


def run(model, params, **cfg):
  params = {name: params[name] for name in regression.COMPONENTS}

  def value(params):
    total, *rest = regression.loss(params, batch(), jax.random.key(0), model=model, cfg=cfg)
    return total, rest

  return tiny.quick_jit(jax.value_and_grad(value, has_aux=True))(params)


@pytest.mark.parametrize("prefix_pass", [True, False])
def test_formula_and_who_learns(prefix_pass):
  model, params = tiny.model(**tiny.VARIANTS["clip_mse"]), tiny.params(0, "clip_mse")
  (total, (weight, metrics)), grads = run(model, params, prefix_pass=prefix_pass)
  call = lambda *args, method: np.asarray(model.apply({"params": params}, *args, method=method), np.float64)
  data = batch()
  states = call(data["tokens"], data["token_mask"], data["positions"], method="query_states")
  features = call(data["pixels"], method="clip_features")
  want = np.mean((states @ params["projection"]["kernel"] - features) ** 2, axis=(1, 2))
  np.testing.assert_allclose(total, want.sum(), rtol=1e-4)
  assert weight == 2
  np.testing.assert_allclose(metrics["variance"] / 2, features.var(axis=(0, 1)).mean(), rtol=1e-4)
  assert not any(g.any() for g in jax.tree.leaves(grads["clip"]))
  assert np.abs(grads["projection"]["kernel"]).min() > 0
  assert np.abs(grads["queries"]["latent_queries"]).max(axis=1).min() > 0
  assert np.asarray(grads["backbone"]["text"]["embedding"]).any() == (not prefix_pass)


def test_one_query_for_each_feature():
  model = tiny.model(**tiny.VARIANTS["clip_mse"], queries=3)
  params = tiny.params(0, "clip_mse") | {"queries": {"latent_queries": np.ones((3, 32), np.float32)}}
  with pytest.raises(UserError, match="3 queries for 4 features"):
    run(model, params)


def test_what_a_step_costs():
  """As generation, but for the DiT; and a picture goes through the VAE where its latents are drawn."""
  shapes = {"tokens": (2, 6), "pixels": (2, 16, 16, 3)}
  *before, projection = regression.passes(tiny.config(), shapes, {})
  assert before == generation.passes(tiny.config(), shapes, {})[:-1]
  assert (projection.component, projection.flops) == ("projection", 2 * 4 * 32 * 16)
  target = generation.passes(tiny.config(**tiny.VARIANTS["vae_flow"]), shapes, {})[0]
  assert target.component == "vae" and target.flops > 0 and not target.gradient
  assert generation.passes(tiny.config(**tiny.VARIANTS["sana"]), shapes, {})[0].flops > 0


def test_a_backbone_that_trains_needs_the_whole_pass():
  with pytest.raises(UserError, match="prefix_pass to False"):
    regression.check({}, {"backbone", "queries"})
  regression.check({"prefix_pass": False}, {"backbone"})
