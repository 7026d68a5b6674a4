"""Flow matching: path, target and time; what a dropped condition is; who learns; and the recorded training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from helpers import GOLDEN, relative_error

from blip3o_jax.diffusion import flow_matching
from blip3o_jax.models.text_decoder import text_positions
from blip3o_jax.objectives import generation
from blip3o_jax.verification import blip3o_generate
from blip3o_jax.verification.recording import Recording, nhwc

B, SIDE, C, Q = 48, 4, 3, 5


class Fake:
  """In place of the model: notes what it is asked for and answers with simple functions."""

  def __init__(self, dtype=jnp.float32):
    self.dtype, self.seen = dtype, {}
    rng = np.random.default_rng(0)
    self.features = jnp.asarray(rng.normal(2.0, 1.0, (B, SIDE**2, C)), jnp.float32)
    self.states = jnp.asarray(rng.normal(size=(B, Q, 8)), jnp.float32)

  def apply(self, variables, *args, method, **kwargs):
    self.seen[method] = args, kwargs
    if method == "velocity":
      x, t, condition = args
      return jnp.sin(3 * x) + t[:, None, None, None] / 1000 + condition.mean(axis=(1, 2))[:, None, None, None]
    return {"image_target": self.features, "query_states": self.states}[method]


def run(seed=0, dtype=jnp.float32, **cfg):
  model = Fake(dtype)
  tokens, mask, positions = tiny.prompts([3] * B, pad_to=4)
  batch = {"tokens": tokens, "token_mask": mask, "positions": positions, "pixels": np.zeros((B, 2, 2, 3), np.uint8)}
  return model, generation.loss({}, batch, jax.random.key(seed), model=model, cfg=cfg)


def test_path_target_and_time():
  """From what the network is given: x = (1 - s) x1 + s noise at time 1000 s, and it should say noise - x1."""
  model, (total, weight, metrics) = run(drop=0.0)
  (x, t, condition), _ = model.seen["velocity"]
  np.testing.assert_array_equal(condition, model.states)
  assert x.shape == (B, SIDE, SIDE, C) and t.shape == (B,)
  sigma = np.asarray(t, np.float64)[:, None, None, None] / 1000
  np.testing.assert_allclose(np.asarray(t), np.round(np.asarray(t)), atol=1e-3)  # the release's grid
  assert 0 < t.min() < 200 and 800 < t.max() <= 1000
  x1 = np.asarray(model.features, np.float64).reshape(x.shape)  # row-major
  noise = (np.asarray(x, np.float64) - (1 - sigma) * x1) / sigma
  assert abs(noise[sigma[:, 0, 0, 0] > 0.2].mean()) < 0.1 and abs(noise[sigma[:, 0, 0, 0] > 0.2].std() - 1) < 0.1
  velocity = np.asarray(model.apply({}, x, t, condition, method="velocity"))
  mse = np.mean((velocity - (noise - x1)) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(total, mse.sum(), rtol=1e-3)
  assert weight == B
  np.testing.assert_allclose(metrics["mse_high_noise"] / weight, mse[sigma[:, 0, 0, 0] > 0.8].mean(), rtol=1e-3)


def test_noise_in_bfloat16_has_the_tails_of_a_normal():
  """jax draws bfloat16 from 8 bits: never above 2.52."""
  (x, t, _), _ = run(dtype=jnp.bfloat16)[0].seen["velocity"]
  assert x.dtype == jnp.bfloat16
  sigma = np.asarray(t, np.float64)[:, None, None, None] / 1000
  features = np.asarray(Fake().features, np.float64).reshape(x.shape)
  noise = (np.asarray(x, np.float64) - (1 - sigma) * features)[sigma[:, 0, 0, 0] > 0.5] / sigma[sigma > 0.5][
    :, None, None, None
  ]
  assert noise.max() > 2.7 and abs(noise.std() - 1) < 0.1


def test_times_of_the_paper_lie_between_the_grid():
  model, _ = run(times="continuous")
  t = np.asarray(model.seen["velocity"][0][1])
  assert np.abs(t - np.round(t)).max() > 0.1 and t.min() > 0 and t.max() <= 1000


@pytest.mark.parametrize("times", ["discrete", "continuous"])
def test_shift_moves_times_to_high_noise(times):
  at = lambda shift: np.asarray(run(times=times, shift=shift)[0].seen["velocity"][0][1], np.float64) / 1000
  plain = at(1.0)
  np.testing.assert_allclose(at(4.0), 4 * plain / (1 + 3 * plain), atol=1e-5)
  np.testing.assert_array_equal(plain, np.asarray(run(times=times)[0].seen["velocity"][0][1], np.float64) / 1000)


def test_a_dropped_condition_is_zero_as_a_whole():
  model, _ = run(drop=0.5)
  condition = np.asarray(model.seen["velocity"][0][2])
  dropped = (condition == 0).all(axis=(1, 2))
  assert 10 < dropped.sum() < B - 10
  np.testing.assert_array_equal(condition[~dropped], np.asarray(model.states)[~dropped])
  assert (np.asarray(run(drop=1.0)[0].seen["velocity"][0][2]) == 0).all()


def test_draws_follow_the_key_and_the_default_drop_is_a_tenth():
  times = lambda seed: np.asarray(run(seed=seed)[0].seen["velocity"][0][1])
  np.testing.assert_array_equal(times(0), times(0))
  assert (times(0) != times(1)).any()
  conditions = np.concatenate([np.asarray(run(seed=s)[0].seen["velocity"][0][2]) for s in range(8)])
  assert 0.05 < (conditions == 0).all(axis=(1, 2)).mean() < 0.16


def test_the_prefix_pass_can_be_switched_off():
  for cfg, want in [({}, True), ({"prefix_pass": False}, False)]:
    model, _ = run(**cfg)
    assert model.seen["query_states"][1] == {"prefix_pass": want}


def test_queries_and_dit_learn_and_neither_prompt_nor_encoder():
  model, params = tiny.model(), tiny.params()
  tokens, mask, positions = tiny.prompts([3, 5], pad_to=6)
  batch = {"tokens": tokens, "token_mask": mask, "positions": positions, "pixels": tiny.pixels(2)}
  params = {name: params[name] for name in generation.COMPONENTS}
  value = lambda p, x: generation.loss(p, x, jax.random.key(0), model=model, cfg={"drop": 0.0})[0]
  loss, grads = tiny.quick_jit(jax.value_and_grad(value))(params, batch)
  assert np.isfinite(loss)
  assert not any(g.any() for g in jax.tree.leaves(grads["clip"]))
  assert not grads["backbone"]["text"]["embedding"].any()  # the prompt runs without gradients
  assert np.abs(grads["queries"]["latent_queries"]).max(axis=1).min() > 0
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads["dit"]) if not g.any()]
  assert still == []


def test_recorded_step(monkeypatch):
  """Freezing the backbone and the prefix pass leave the loss and the gradients of queries and DiT as recorded."""
  rec = Recording(GOLDEN / "blip3o_train_step")
  model, _, params = blip3o_generate.load(rec)
  tokens, mask, start = rec.input("input_ids"), rec.input("attention_mask").astype(bool), rec.input("i_s_pos")
  mask = (mask & (np.arange(tokens.shape[1]) < start[:, None]))[:, : start.max()]
  positions = np.broadcast_to(np.asarray(text_positions(jnp.asarray(mask)))[:, None], (len(mask), 3, mask.shape[1]))
  x1 = jnp.asarray(nhwc(rec.input("target_latents")))
  batch = {"tokens": tokens[:, : start.max()], "token_mask": mask, "positions": positions}
  batch["features"] = x1.reshape(len(x1), -1, x1.shape[-1])
  # The recorded draws in the place of ours.
  keep = jnp.asarray(rec.input("cond_keep_mask")).reshape(-1, 1, 1)
  times = flow_matching.times_at(jnp.asarray(rec.input("u")))
  monkeypatch.setattr(jax.random, "normal", lambda *args: jnp.asarray(nhwc(rec.input("noise"))))
  monkeypatch.setattr(flow_matching, "sample_times", lambda *args, **kwargs: times)
  monkeypatch.setattr(flow_matching, "drop_condition", lambda rng, condition, p: condition * keep)

  def loss(trained):
    total, weight, _ = generation.loss(params | trained, batch, jax.random.key(0), model=model, cfg={})
    return total / weight

  value, grads = tiny.quick_jit(jax.value_and_grad(loss))({name: params[name] for name in ("queries", "dit")})
  assert relative_error(value, rec.input("loss")) < 1e-4
  assert relative_error(grads["queries"]["latent_queries"], rec.input("grad:model.latent_queries")[0]) < 1e-3
  head = rec.input("grad:model.dit.model.norm_out.linear_2.weight").T
  assert relative_error(grads["dit"]["out_fc"]["kernel"], head) < 1e-3


def test_a_component_of_the_objective_is_one_of_the_model():
  from blip3o_jax import objectives
  from blip3o_jax.errors import UserError
  from blip3o_jax.models.blip3o import COMPONENTS

  for name in objectives.NAMES:
    assert set(objectives.get(name).COMPONENTS) <= set(COMPONENTS)
  with pytest.raises(UserError, match="'flow' is unknown; choose one of autoencoding"):
    objectives.get("flow")
