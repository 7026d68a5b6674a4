"""The diffusion decoder's process: scaled-linear betas, noise and targets for training, Euler steps for sampling
(diffusers' EulerDiscreteScheduler with leading spacing, as in SDXL and the release; spec part 6.3)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.diffusion.guidance import guided_call, guided_steps
from blip3o_jax.diffusion.solvers import multistep_weights
from blip3o_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EulerDiscreteConfig:
  """The process; the defaults are SDXL's. `prediction` says what the network gives: "epsilon" or "v_prediction"."""

  train_steps: int = 1000
  beta_start: float = 0.00085
  beta_end: float = 0.012
  steps_offset: int = 1
  prediction: str = "epsilon"

  def __post_init__(self):
    if self.prediction not in ("epsilon", "v_prediction"):
      raise UserError(f"Euler scheduler: prediction {self.prediction!r} is neither 'epsilon' nor 'v_prediction'")

  @classmethod
  def from_reference(cls, config: dict) -> "EulerDiscreteConfig":
    """From the reference's scheduler_config.json.

    Raises:
      UserError: another schedule, spacing or interpolation than the release's.
    """
    plain = {
      "beta_schedule": "scaled_linear",
      "timestep_spacing": "leading",
      "interpolation_type": "linear",
      "use_karras_sigmas": False,
      "use_exponential_sigmas": False,
      "use_beta_sigmas": False,
      "final_sigmas_type": "zero",
      "rescale_betas_zero_snr": False,
      "timestep_type": "discrete",
      "trained_betas": None,
    }
    config = {"beta_schedule": "linear", "timestep_spacing": "linspace"} | config  # diffusers' silent defaults
    wrong = [f"{k}={config[k]!r}" for k, v in plain.items() if k in config and config[k] != v]
    if wrong:
      raise UserError(f"scheduler config: not supported: {', '.join(wrong)}; expected the values of SDXL")
    return cls(
      config["num_train_timesteps"],
      config["beta_start"],
      config["beta_end"],
      config.get("steps_offset", 0),
      config.get("prediction_type", "epsilon"),
    )

  def to_reference(self) -> dict:
    """scheduler_config.json of diffusers' EulerDiscreteScheduler."""
    return {
      "num_train_timesteps": self.train_steps,
      "beta_start": self.beta_start,
      "beta_end": self.beta_end,
      "beta_schedule": "scaled_linear",
      "timestep_spacing": "leading",
      "steps_offset": self.steps_offset,
      "prediction_type": self.prediction,
      "interpolation_type": "linear",
      "use_karras_sigmas": False,
    }


def alphas_cumprod(cfg: EulerDiscreteConfig) -> np.ndarray:
  """The share of signal variance left at each training step: float64 [train_steps]."""
  betas = np.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, cfg.train_steps) ** 2
  return np.cumprod(1.0 - betas)


def _signal_and_noise(cfg, t, ndim):
  """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t int [B], shaped to multiply [B, ...] of `ndim` axes."""
  table = alphas_cumprod(cfg)
  pick = lambda values: jnp.asarray(values, jnp.float32)[t].reshape(-1, *(1,) * (ndim - 1))
  return pick(np.sqrt(table)), pick(np.sqrt(1.0 - table))


def add_noise(cfg: EulerDiscreteConfig, x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) noise: x, noise [B, ...], t int [B] in 0..train_steps-1 -> [B, ...]."""
  a, s = _signal_and_noise(cfg, t, x.ndim)
  return a * x + s * noise


def training_target(cfg: EulerDiscreteConfig, x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """What the network should give for `add_noise(cfg, x, noise, t)`: the noise, or
  v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x (Salimans and Ho 2022): [B, ...]."""
  if cfg.prediction == "epsilon":
    return noise
  a, s = _signal_and_noise(cfg, t, x.ndim)
  return a * noise - s * x


class EulerTables(NamedTuple):
  """sigmas float32 [steps + 1], the last one 0; timesteps float32 [steps]; init_noise_sigma scales unit noise."""

  sigmas: np.ndarray
  timesteps: np.ndarray
  init_noise_sigma: float


def euler_tables(cfg: EulerDiscreteConfig, steps: int) -> EulerTables:
  """Leading spacing: t = offset + k (train_steps // steps), descending; sigma = sqrt((1 - alpha_bar) / alpha_bar).

  50 steps of the defaults: 981, 961, ..., 1 and sigma 13.120416 ... 0.041314, 0.

  Raises:
    UserError: steps below 1, or so many that the offset leads past the last training step.
  """
  stride = cfg.train_steps // max(steps, 1)
  if steps < 1 or stride < 1 or stride * (steps - 1) + cfg.steps_offset >= cfg.train_steps:
    raise UserError(f"Euler sampler: {steps} steps do not fit {cfg.train_steps} training steps; choose fewer")
  timesteps = np.arange(steps)[::-1] * stride + cfg.steps_offset
  table = alphas_cumprod(cfg)[timesteps]
  sigmas = np.append(np.sqrt((1.0 - table) / table), 0.0).astype(np.float32)
  return EulerTables(sigmas, timesteps.astype(np.float32), float(np.sqrt(sigmas[0] ** 2 + 1.0)))


class EulerSample(NamedTuple):
  """latents float32 [B, ...]; with `trajectory`, the latents after each step and the guided predictions, both
  [steps, B, ...], else None."""

  latents: jax.Array
  states: jax.Array | None
  predictions: jax.Array | None


def sample_euler_discrete(
  model_fn: Callable[[jax.Array, jax.Array], jax.Array],
  noise: jax.Array,
  cfg: EulerDiscreteConfig,
  *,
  steps: int = 50,
  guidance: float = 3.0,
  solver: str = "euler",
  interval: tuple[float, float] = (0.0, 1.0),
  trajectory: bool = False,
) -> EulerSample:
  """Noise to latents by Euler steps under classifier-free guidance, one `lax.scan`.

  Args:
    model_fn: (latents [2B, ...], t float32 scalar) -> prediction [2B, ...]; the first half of the batch is to be
      conditioned, the second half not (the opposite of the flow sampler, as in the release). With guidance <= 1 the
      batch is [B, ...], conditioned only.
    noise: unit normal [B, ...].
    guidance: a Python number, since it decides the shape of the batch.
    solver: "euler", or "adams_bashforth", of second order for as many evaluations (solvers.py).
    interval: the times, as shares of train_steps, at which there is guidance; at others the batch is [B, ...].
    trajectory: also return every step.

  Returns:
    EulerSample; the state is float32 throughout, whatever the network computes in.
  """
  tables = euler_tables(cfg, steps)
  sigmas = tables.sigmas
  rows = {
    "sigma": sigmas[:-1],
    "next": sigmas[1:],
    "t": tables.timesteps,
    "weight": multistep_weights(sigmas, solver),
    "guided": guided_steps(tables.timesteps / cfg.train_steps, interval),
  }
  predict = guided_call(model_fn, guidance if guidance > 1 else None, null=1)

  def step(carry, now):
    x, before = carry
    sigma = now["sigma"]
    a = jax.lax.rsqrt(sigma**2 + 1.0)  # sqrt(alpha_bar): the state is x0 + sigma noise, the network wants unit variance
    scaled = x * a
    out = predict(scaled, now["t"], now["guided"])
    noise_now = out if cfg.prediction == "epsilon" else a * out + sigma * a * scaled
    x = x + noise_now * (now["next"] - sigma)
    if now["weight"] is not None:
      x = x + now["weight"] * (noise_now - before)
    return (x, noise_now), (x, out) if trajectory else None

  start = noise.astype(jnp.float32) * tables.init_noise_sigma
  (x, _), seen = jax.lax.scan(step, (start, jnp.zeros_like(start)), rows)
  return EulerSample(x, *(seen or (None, None)))
