"""Flow matching: scheduler tables, one training batch with its gradients, and the guided sampling loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.diffusion import flow_matching, solvers
from blip3o_jax.diffusion.euler_discrete import EulerSample
from blip3o_jax.diffusion.guidance import null_first
from blip3o_jax.errors import UserError
from blip3o_jax.verification import next_dit
from blip3o_jax.verification.recording import FORWARD, TRAJECTORY, Recording, nchw, nhwc


def check(rec: Recording) -> None:
  dit = next_dit.load(rec, rec.setting("dit"), rec.weights())
  count, shift = int(rec.setting("scheduler", "num_train_timesteps")), float(rec.setting("scheduler", "shift"))
  cond = jnp.asarray(rec.input("cond"))

  # Training
  sigmas, times = flow_matching.times_table(count, shift)
  rec.compare("train_timesteps", times)
  rec.compare("train_sigmas", sigmas)
  x1, noise = nhwc(rec.input("train_latents")), nhwc(rec.input("train_noise"))
  index = rec.input("train_indices")
  sigma, t = jnp.asarray(sigmas)[index], jnp.asarray(times)[index]
  rec.compare("train_t", t)
  rec.compare("train_sigma", sigma)
  noisy = flow_matching.interpolate(x1, noise, sigma)
  rec.compare("train_noisy", nchw(noisy))
  keep = jnp.asarray(rec.input("train_cond_keep_mask")).reshape(-1, 1, 1)

  def loss(params, cond):
    velocity = dit(params, noisy, t, cond * keep)
    return jnp.mean(jnp.square(velocity - flow_matching.target(x1, noise))), velocity

  (value, velocity), (grads, grad_cond) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
    dit.params, cond
  )
  rec.compare("train_pred", nchw(velocity))
  rec.compare("train_loss", value)
  rec.compare("train_grad_cond", grad_cond, TRAJECTORY)
  rec.compare_gradients({"dit": grads}, dit.key, prefix="train_grad:")

  # Sampling
  steps, guidance = int(rec.setting("steps")), float(rec.setting("guidance_scale"))
  schedule = solvers.flow_euler_schedule(steps, shift, n=count)
  rec.compare("sample_sigmas", schedule.sigmas)
  rec.compare("sample_timesteps", schedule.times)
  rec.compare("sample_dit_timesteps", np.trunc(schedule.times))
  start = nhwc(rec.input("sample_init_noise"))
  sample = draw(dit, dit.params, cond, start, steps=steps, guidance=guidance, shift=shift, n=count)
  compare_states(rec, "", sample)
  rec.compare("sample_final", nchw(sample.latents), TRAJECTORY)


def draw(dit: next_dit.LoadedDiT, params, cond: jax.Array, noise: jax.Array, **settings) -> solvers.FlowSample:
  """The sampler on a condition [B, L, E] and noise [B n, h, w, C], the constant part of the condition computed once."""
  cond = per_image(cond, len(noise))

  def run(params, cond, noise):
    both = cond if settings["guidance"] == 1 else null_first(cond)
    projected = dit.model.apply({"params": params}, both, method="project")
    velocity = lambda x, t: dit.model.apply({"params": params}, x, t, None, projected)
    return solvers.sample_flow(velocity, noise, trajectory=True, **settings)

  return jax.jit(run)(params, cond, noise)


def per_image(cond: jax.Array, images: int) -> jax.Array:
  """A condition [B, ...] for `images` = B n pictures: each row n times, as the reference repeats it (spec 3.3).

  Raises:
    UserError: B does not divide the number of pictures.
  """
  if images % len(cond):
    raise UserError(f"{images} pictures cannot share {len(cond)} conditions; record whole rows")
  return jnp.repeat(jnp.asarray(cond), images // len(cond), axis=0)


def compare_states(rec: Recording, prefix: str, sample: solvers.FlowSample | EulerSample) -> None:
  """What is recorded on the way, under any name that ends so: `after10`, `after_half`: the latents after that many
  steps; `guided_step1`, `guided_pred_step1`: the guided prediction of that step."""
  _, states, predictions = sample
  name = re.escape(prefix) + r"(?:\w+_)?"
  for pattern, arrays in ((r"after(\d+)", states), (r"guided_(?:pred_)?step(\d+)", predictions)):
    for array, step in rec.matching(name + pattern):
      if 1 <= step <= len(arrays):
        rec.compare(array, nchw(arrays[step - 1]), FORWARD if step == 1 else TRAJECTORY)
  for array in rec.names:
    if re.fullmatch(name + "after_half", array) and len(states) > 1:
      rec.compare(array, nchw(states[len(states) // 2 - 1]), TRAJECTORY)
