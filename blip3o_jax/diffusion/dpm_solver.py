"""DPM-Solver++ of second order for flows, the sampler of the Sana decoder (diffusers' DPMSolverMultistepScheduler with
flow sigmas; Lu et al. 2022, arXiv 2211.01095; spec part 7.3)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.diffusion.flow_matching import shift_sigma
from blip3o_jax.diffusion.guidance import guided_velocity
from blip3o_jax.diffusion.solvers import FlowSample
from blip3o_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DPMSolverConfig:
  """The solver; the defaults are Sana's. `order` is 1 (Euler) or 2; `shift` more than 1 spends steps on high noise."""

  order: int = 2
  shift: float = 3.0
  train_steps: int = 1000

  def __post_init__(self):
    if self.order not in (1, 2):
      raise UserError(f"DPM solver: order {self.order} is neither 1 nor 2")

  @classmethod
  def from_reference(cls, config: Mapping[str, Any]) -> "DPMSolverConfig":
    """From the reference's scheduler_config.json.

    `lower_order_final` and `euler_at_final` need no field: a last sigma of zero makes the last step one of first order,
    and both concern orders above 2 besides.

    Raises:
      UserError: another process, solver or end than Sana's.
    """
    silent = {  # what an entry is where the file is silent (diffusers' defaults)
      "algorithm_type": "dpmsolver++",
      "solver_type": "midpoint",
      "prediction_type": "epsilon",
      "use_flow_sigmas": False,
      "final_sigmas_type": "zero",
      "thresholding": False,
      "use_karras_sigmas": False,
      "use_exponential_sigmas": False,
      "use_beta_sigmas": False,
      "use_lu_lambdas": False,
      "use_dynamic_shifting": False,
    }
    wanted = silent | {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    found = silent | dict(config)
    if wrong := [f"{key}={found[key]!r}" for key in wanted if found[key] != wanted[key]]:
      raise UserError(f"scheduler config: not supported: {', '.join(wrong)}; expected the values of Sana")
    return cls(config.get("solver_order", 2), config.get("flow_shift", 1.0), config.get("num_train_timesteps", 1000))


class DPMTables(NamedTuple):
  """sigmas float32 [steps + 1], the last one 0; timesteps int32 [steps], 1000 sigma cut to a whole number."""

  sigmas: np.ndarray
  timesteps: np.ndarray


def dpm_tables(cfg: DPMSolverConfig, steps: int) -> DPMTables:
  """Equal steps from 1 - 1/n down to 0, n = cfg.train_steps, then shifted: never quite pure noise.

  8 steps of the defaults: 999, 954, 899, 832, 749, 642, 499, 299.

  Raises:
    UserError: steps below 1.
  """
  if steps < 1:
    raise UserError(f"DPM solver: {steps} steps; choose at least 1")
  sigmas = shift_sigma(1.0 - np.linspace(1.0, 1.0 / cfg.train_steps, steps + 1), cfg.shift)[::-1]
  return DPMTables(sigmas.astype(np.float32), (sigmas[:-1] * cfg.train_steps).astype(np.int32))


def _weights(cfg: DPMSolverConfig, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(ratio, slope) of every step, float32 [steps]: x' = ratio x + (1 - ratio) (m + slope (m - m before)).

  m = x - sigma v is the data that the network sees. The paper's coefficients come down to these because alpha = 1 -
  sigma: alpha' (exp(-h) - 1) = sigma' / sigma - 1, and slope = h / (2 h before), h the step of log(alpha / sigma).
  The first step has nothing before it, and the last one an infinite h: they are of first order.
  """
  s = sigmas.astype(np.float64)
  h = np.diff(np.log((1 - s[:-1]) / s[:-1]))
  slope = np.zeros(len(s) - 1)
  if cfg.order == 2:
    slope[1:-1] = 0.5 * h[1:] / h[:-1]
  return (s[1:] / s[:-1]).astype(np.float32), slope.astype(np.float32)


def sample_dpm_solver(
  velocity_fn: Callable[[jax.Array, jax.Array], jax.Array],
  noise: jax.Array,
  cfg: DPMSolverConfig = DPMSolverConfig(),
  *,
  steps: int = 30,
  guidance: float = 3.0,
  trajectory: bool = False,
) -> FlowSample:
  """Noise to data by multistep DPM-Solver++ under classifier-free guidance, one `lax.scan`.

  Args:
    velocity_fn: (x [2B, ...], t float32 [2B]) -> velocity noise - data [2B, ...], the unconditioned half first
      (`guidance.guided_velocity`). What depends on the condition alone is best computed outside (`Sana.project`).
    noise: unit normal [B, ...].
    guidance: a Python number, since it decides the shape of the batch; with 1 the batch is [B, ...], conditioned.
    trajectory: also return every step.

  Returns:
    FlowSample; the state is float32 throughout, whatever the network computes in.
  """
  tables = dpm_tables(cfg, steps)
  velocity = guided_velocity(velocity_fn, guidance)

  def step(carry, now):
    x, before = carry
    sigma, t, ratio, slope = now
    v = velocity(x, t)
    data = x - sigma * v
    x = ratio * x + (1 - ratio) * (data + slope * (data - before))
    return (x, data), (x, v) if trajectory else None

  start = noise.astype(jnp.float32)
  rows = tables.sigmas[:-1], tables.timesteps.astype(np.float32), *_weights(cfg, tables.sigmas)
  (x, _), seen = jax.lax.scan(step, (start, jnp.zeros_like(start)), rows)
  return FlowSample(x, *(seen or (None, None)))
