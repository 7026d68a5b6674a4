"""DPM-Solver++ on flows: the recorded tables, the paper's own formulas, and a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.diffusion.dpm_solver import DPMSolverConfig, dpm_tables, sample_dpm_solver
from blip3o_jax.errors import UserError


def test_recorded_tables():
  g = load_golden("sana_decoder")
  tables = dpm_tables(DPMSolverConfig.from_reference(g.config["scheduler"]), g.config["steps"])
  np.testing.assert_array_equal(tables.timesteps, g.io["dpm_timesteps"])
  np.testing.assert_array_equal(tables.sigmas, g.io["dpm_sigmas"])
  assert tables.timesteps.dtype == np.int32 and tables.sigmas.dtype == np.float32


def textbook(velocity, x, sigmas, times, order, guidance):
  """Lu et al. 2022, algorithm 2 (midpoint), as written: lambda = log(alpha / sigma), alpha = 1 - sigma."""
  lam = lambda s: np.log(1 - s) - np.log(s) if s else np.inf
  states, before = [], None
  for i, (s, s_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
    null, cond = np.split(velocity(np.concatenate([x, x]), times[i]), 2)
    m = x - s * (null + guidance * (cond - null))
    h = lam(s_next) - lam(s)
    last, first = s_next == 0, before is None
    d = m if order == 1 or last or first else m + 0.5 * (h / (lam(s) - lam(sigmas[i - 1]))) * (m - before)
    x, before = s_next / s * x - (1 - s_next) * (np.exp(-h) - 1) * d, m
    states.append(x)
  return np.stack(states)


@pytest.mark.parametrize("order, steps, shift", [(2, 6, 3.0), (2, 3, 1.0), (1, 4, 3.0), (2, 1, 3.0), (2, 20, 3.0)])
def test_every_step_is_the_papers(order, steps, shift):
  cfg = DPMSolverConfig(order=order, shift=shift)
  noise = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
  rows = np.array([[0.3], [0.5], [1.0], [2.0]])  # null, null, cond, cond
  out = sample_dpm_solver(
    lambda x, t: jnp.sin(rows * x) + t[:, None] / 1000, noise, cfg, steps=steps, guidance=2.5, trajectory=True
  )
  tables = dpm_tables(cfg, steps)
  velocity = lambda x, t: np.sin(rows * x) + t / 1000
  expected = textbook(
    velocity, noise.astype(np.float64), tables.sigmas.astype(np.float64), tables.timesteps, order, 2.5
  )
  assert relative_error(out.states, expected) < 1e-5
  assert relative_error(out.latents, expected[-1]) < 1e-5
  assert out.velocities.shape == (steps, 2, 3)


def test_straight_paths_are_solved_exactly():
  """The data that the network sees is then always the same, though the first sigma is not quite 1."""
  x1, noise = jax.random.normal(jax.random.key(0), (2, 4, 3))
  out = sample_dpm_solver(lambda x, t: noise - x1, noise, steps=5, guidance=1.0)
  first = float(dpm_tables(DPMSolverConfig(), 5).sigmas[0])
  assert 0.999 < first < 1 and relative_error(out.latents, noise - first * (noise - x1)) < 1e-5
  assert out.states is None and out.velocities is None


def test_network_sees_whole_times_and_null_first():
  seen = []

  def velocity(x, t):
    jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
    assert x.shape[0] == 4
    return jnp.where(jnp.arange(4) < 2, 1.0, 3.0)[:, None].astype(jnp.bfloat16) * jnp.ones_like(x, jnp.bfloat16)

  out = sample_dpm_solver(velocity, jnp.zeros((2, 3), jnp.bfloat16), steps=8, guidance=2.0, trajectory=True)
  jax.effects_barrier()
  assert np.array_equal(np.stack(seen)[:, 0], load_golden("sana_decoder").io["dpm_timesteps"])
  assert np.allclose(out.velocities, 5.0) and out.latents.dtype == jnp.float32


def test_guidance_one_runs_the_condition_alone():
  sizes = []
  sample_dpm_solver(lambda x, t: sizes.append((x.shape[0], t.shape)) or x, jnp.ones((2, 3)), steps=2, guidance=1.0)
  assert set(sizes) == {(2, (2,))}


def test_bad_requests():
  config = load_golden("sana_decoder").config["scheduler"]
  for change in ({"solver_type": "heun"}, {"use_flow_sigmas": False}, {"final_sigmas_type": "sigma_min"}):
    with pytest.raises(UserError, match=next(iter(change))):
      DPMSolverConfig.from_reference(config | change)
  with pytest.raises(UserError, match="prediction_type='epsilon'"):
    DPMSolverConfig.from_reference({k: v for k, v in config.items() if k != "prediction_type"})
  with pytest.raises(UserError, match="order 3"):
    DPMSolverConfig.from_reference(config | {"solver_order": 3})
  with pytest.raises(UserError, match="steps"):
    dpm_tables(DPMSolverConfig(), 0)
