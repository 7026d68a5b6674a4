"""The flow sampler against the recorded 30-step run of the reference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.diffusion.guidance import guide, null_first
from blip3o_jax.diffusion.solvers import flow_euler_schedule, sample_flow
from blip3o_jax.errors import UserError
from blip3o_jax.models.next_dit import NextDiT, NextDiTConfig
from blip3o_jax.porting import convert
from blip3o_jax.porting.rules import next_dit as rules


def test_schedule_is_the_reference():
  io = load_golden("flow").io
  schedule = flow_euler_schedule(30)
  assert np.array_equal(schedule.sigmas, io["sample_sigmas"])
  assert np.array_equal(schedule.times, io["sample_timesteps"])
  assert np.array_equal(np.trunc(schedule.times), io["sample_dit_timesteps"])
  assert np.trunc(schedule.times)[[1, 2, 15, 29]].tolist() == [966, 933, 500, 33]


def test_shifted_schedule_still_runs_from_one_to_zero():
  sigmas = flow_euler_schedule(4, shift=3.0).sigmas
  assert np.allclose(sigmas, [1.0, 0.9, 0.75, 0.5, 0.0])


def test_steps_below_one_are_told():
  with pytest.raises(UserError, match="steps"):
    flow_euler_schedule(0)


@pytest.fixture(scope="module")
def run():
  golden = load_golden("flow")
  io = golden.io
  cfg = NextDiTConfig.from_reference(golden.config["dit"], {k: v.shape for k, v in golden.weights.items()})
  model, noise = NextDiT(cfg), io["sample_init_noise"].transpose(0, 2, 3, 1)
  abstract = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), noise, jnp.zeros(2), io["cond"]))["params"]
  params = convert.to_ours(rules.RULES, golden.weights, abstract)

  @jax.jit
  def sample(params, noise, condition):
    projected = model.apply({"params": params}, null_first(condition), method="project")
    velocity = lambda x, t: model.apply({"params": params}, x, t, None, projected)
    settings = {"steps": golden.config["steps"], "guidance": golden.config["guidance_scale"]}
    return sample_flow(velocity, noise, **settings, trajectory=True)

  return io, sample(params, noise, io["cond"])


def test_whole_trajectory(run):
  io, sample = run
  ours = {
    "sample_guided_pred_step1": sample.velocities[0],
    "sample_after1": sample.states[0],
    "sample_after10": sample.states[9],
    "sample_after20": sample.states[19],
    "sample_final": sample.latents,
  }
  tables = {"sample_init_noise", "sample_sigmas", "sample_timesteps", "sample_dit_timesteps"}
  assert set(ours) == {k for k in io if k.startswith("sample_")} - tables
  errors = {k: relative_error(np.asarray(v).transpose(0, 3, 1, 2), io[k]) for k, v in ours.items()}
  assert max(errors.values()) < 1e-3 and errors["sample_guided_pred_step1"] < 1e-4, errors


def test_network_sees_whole_times_and_null_first():
  seen = []

  def velocity(x, t):
    jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
    null = jnp.arange(x.shape[0]) < x.shape[0] // 2
    return jnp.where(null[:, None], 1.0, 3.0) * jnp.ones_like(x)

  out = sample_flow(velocity, jnp.zeros((2, 3)), steps=30, guidance=2.0)
  jax.effects_barrier()
  assert np.array_equal(np.stack(seen), np.repeat(np.trunc(flow_euler_schedule(30).times)[:, None], 4, axis=1))
  assert np.allclose(out.latents, -5.0, atol=1e-5)  # 1 + 2 (3 - 1), over a way of -1
  assert out.states is None and out.velocities is None
  seen.clear()
  sample_flow(velocity, jnp.zeros((2, 3)), steps=30, truncate_times=False)
  jax.effects_barrier()
  assert abs(seen[1][0] - 966.6667) < 1e-3


def test_guidance_one_runs_the_condition_alone():
  sizes = []

  def velocity(x, t):
    sizes.append((x.shape[0], t.shape))
    return x

  sample_flow(velocity, jnp.ones((2, 3)), steps=2, guidance=1.0)
  assert set(sizes) == {(2, (2,))}


def test_straight_paths_are_solved_exactly_in_one_step():
  x1, noise = jax.random.normal(jax.random.key(0), (2, 4, 3))
  out = sample_flow(lambda x, t: noise - x1, noise, steps=1, guidance=1.0)
  assert relative_error(out.latents, x1) < 1e-6


def test_guide_and_null_first():
  null, cond = jnp.asarray([1.0]), jnp.asarray([2.0])
  assert [float(guide(null, cond, s)[0]) for s in (0.0, 1.0, 3.0)] == [1.0, 2.0, 4.0]
  doubled = null_first(jnp.ones((2, 3, 4)))
  assert doubled.shape == (4, 3, 4) and not doubled[:2].any() and doubled[2:].all()


# ---- solvers of higher order, limited guidance


def bell(x, t):
  """The velocity where the data are normal of deviation 0.5: paths end at half their noise."""
  sigma = t[:, None] / 1000
  return (sigma - (1 - sigma) / 4) / ((1 - sigma) ** 2 / 4 + sigma**2) * x


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams_bashforth", 2)])
def test_order_of_convergence(solver, order):
  """Twice the steps: half the error of Euler, a quarter of two steps at a time."""
  noise = np.linspace(0.5, 2, 4, dtype=np.float32)[:, None]
  errors = []
  for steps in (16, 32, 64):
    out = sample_flow(bell, noise, steps=steps, guidance=1.0, truncate_times=False, solver=solver)
    errors.append(relative_error(out.latents, 0.5 * noise))
  orders = np.log2(np.divide(errors[:-1], errors[1:]))
  assert np.allclose(orders, order, atol=0.2), (errors, orders)
  assert errors[-1] < (0.03 if order == 1 else 5e-4)


def test_guidance_in_an_interval_alone():
  """Outside, the conditioned branch runs by itself, on half the batch; both ends belong to the interval."""
  ran = []

  def velocity(x, t):
    jax.debug.callback(lambda t, n=x.shape[0]: ran.append((float(t[0]), n)), t, ordered=True)
    return jnp.where(jnp.arange(len(x)) < len(x) - 2, 1.0, 3.0)[:, None] * jnp.ones_like(x)

  out = sample_flow(velocity, jnp.zeros((2, 3)), steps=4, guidance=2.0, interval=(0.5, 0.75), trajectory=True)
  jax.effects_barrier()
  assert ran == [(1000.0, 2), (750.0, 4), (500.0, 4), (250.0, 2)]
  assert out.velocities[:, 0, 0].tolist() == [3.0, 5.0, 5.0, 3.0]


def test_unknown_solver():
  with pytest.raises(UserError, match="solver 'heun' is unknown; choose one of euler, adams_bashforth"):
    sample_flow(lambda x, t: x, jnp.ones((1, 1)), solver="heun")
