"""Solvers of the flow's differential equation, from noise to data (spec 3.3)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.diffusion.flow_matching import shift_sigma
from blip3o_jax.diffusion.guidance import guided_velocity
from blip3o_jax.errors import UserError


class FlowSchedule(NamedTuple):
  """sigmas float32 [steps + 1], the last one 0; times float32 [steps], 1000 sigma."""

  sigmas: np.ndarray
  times: np.ndarray


def flow_euler_schedule(steps: int = 30, shift: float = 1.0, *, n: int = 1000) -> FlowSchedule:
  """Equal steps 1, 1 - 1/steps, ..., 1/steps, 0 (before the shift), rounded to float32 where the reference rounds.

  Raises:
    UserError: steps below 1.
  """
  if steps < 1:
    raise UserError(f"flow sampler: {steps} steps; choose at least 1")
  sigmas = shift_sigma(np.linspace(1.0, 1.0 / steps, steps).astype(np.float32), np.float32(shift))
  return FlowSchedule(np.append(sigmas, np.float32(0)), sigmas * np.float32(n))


class FlowSample(NamedTuple):
  """latents float32 [B, ...]; with `trajectory`, the latents after each step and the (guided) velocities, both
  [steps, B, ...], else None."""

  latents: jax.Array
  states: jax.Array | None
  velocities: jax.Array | None


def sample_flow(
  velocity_fn: Callable[[jax.Array, jax.Array], jax.Array],
  noise: jax.Array,
  *,
  steps: int = 30,
  guidance: float = 3.0,
  shift: float = 1.0,
  n: int = 1000,
  truncate_times: bool = True,
  trajectory: bool = False,
) -> FlowSample:
  """Noise to data by Euler steps x + (sigma' - sigma) v under classifier-free guidance, one `lax.scan`.

  Args:
    velocity_fn: (x [2B, ...], t float32 [2B]) -> velocity [2B, ...]; the first half of the batch is to be
      unconditioned, the second conditioned (`guidance.null_first`). With guidance 1 the batch is [B, ...], conditioned.
      Whatever depends on the condition alone is best computed outside (`NextDiT.project`).
    noise: unit normal [B, ...].
    guidance: a Python number, since it decides the shape of the batch.
    n: the time that stands for pure noise.
    truncate_times: give the network whole times, 1000, 966, 933, ..., as the release does; the steps themselves use
      the exact sigmas.
    trajectory: also return every step.

  Returns:
    FlowSample; the state is float32 throughout, whatever the network computes in.
  """
  schedule = flow_euler_schedule(steps, shift, n=n)
  times = np.trunc(schedule.times) if truncate_times else schedule.times
  velocity = guided_velocity(velocity_fn, guidance)

  def step(x, now):
    sigma, next_sigma, t = now
    v = velocity(x, t)
    x = x + (next_sigma - sigma) * v
    return x, (x, v) if trajectory else None

  x, seen = jax.lax.scan(step, noise.astype(jnp.float32), (schedule.sigmas[:-1], schedule.sigmas[1:], times))
  return FlowSample(x, *(seen or (None, None)))
