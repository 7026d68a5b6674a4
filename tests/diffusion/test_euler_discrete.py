"""The decoder's noise schedule and sampler against the recorded loop, and both predictions against known answers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.diffusion.euler_discrete import (
  EulerDiscreteConfig,
  add_noise,
  alphas_cumprod,
  euler_tables,
  sample_euler_discrete,
  training_target,
)
from blip3o_jax.errors import UserError
from blip3o_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from blip3o_jax.models.unet import UNet, UNetConfig
from blip3o_jax.porting.convert import to_ours
from blip3o_jax.porting.rules import autoencoder_kl as vae_rules
from blip3o_jax.porting.rules import unet as unet_rules


def nhwc(x):
  return x.transpose(0, 2, 3, 1)


def weights_of(golden, prefix, module, rules, *args):
  shapes = nn.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))["params"]
  weights = {k.removeprefix(prefix): v for k, v in golden.weights.items() if k.startswith(prefix)}
  return {"params": to_ours(rules, weights, shapes)}


def test_recorded_tables():
  g = load_golden("sdxl_decoder")
  tables = euler_tables(EulerDiscreteConfig.from_reference(g.config["scheduler"]), g.config["steps"])
  np.testing.assert_array_equal(tables.timesteps, g.io["timesteps"])
  assert relative_error(tables.sigmas, g.io["sigmas"]) < 1e-5
  assert relative_error(tables.init_noise_sigma, g.io["init_noise_sigma"]) < 1e-5


def test_tables_of_the_release():
  tables = euler_tables(EulerDiscreteConfig(), 50)
  assert tables.timesteps[[0, 1, -2, -1]].tolist() == [981, 961, 21, 1]
  np.testing.assert_allclose(
    tables.sigmas[[0, 1, 2, -3, -2, -1]], [13.120416, 11.676050, 10.425045, 0.141464, 0.041314, 0], rtol=1e-5
  )
  assert abs(tables.init_noise_sigma - 13.1585) < 1e-4


def test_recorded_loop():
  g = load_golden("sdxl_decoder")
  io, config = g.io, g.config
  unet = UNet(UNetConfig.from_reference(config["unet"]))
  context, sizes = np.concatenate([io["cond"], io["null_cond"]]), io["time_ids"].reshape(2, 6)
  pooled = context.mean(axis=1)
  params = weights_of(g, "unet.", unet, unet_rules.RULES, nhwc(io["unet_sample_in"]), 1.0, context, pooled, sizes)

  @jax.jit
  def sample(params, noise):
    projected = unet.apply(params, context, method="project")
    predict = lambda x, t: unet.apply(params, x, t, None, pooled, sizes, projected=projected)
    scheduler = EulerDiscreteConfig.from_reference(config["scheduler"])
    how = {"steps": config["steps"], "guidance": config["guidance_scale"], "trajectory": True}
    return sample_euler_discrete(predict, noise, scheduler, **how)

  ours = sample(params, nhwc(io["init_noise"]))
  assert relative_error(ours.predictions[0], nhwc(io["guided_step1"])) < 1e-4
  assert relative_error(ours.states[0], nhwc(io["latents_after1"])) < 1e-3
  assert relative_error(ours.states[config["steps"] // 2 - 1], nhwc(io["latents_after_half"])) < 1e-3
  assert relative_error(ours.latents, nhwc(io["latents_final"])) < 1e-3

  vae = AutoencoderKL(AutoencoderKLConfig.from_reference(config["vae"]))
  params = weights_of(g, "vae.", vae, vae_rules.RULES, np.zeros((1, 64, 64, 3), np.float32))
  image = jax.jit(lambda p, z: vae.apply(p, z / vae.cfg.scaling_factor, method="decode"))(params, ours.latents)
  image = np.clip(image / 2 + 0.5, 0, 1)
  assert relative_error(image, io["image"]) < 1e-3
  assert np.abs(np.round(image * 255).astype(int) - io["image_uint8"].astype(int)).max() <= 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_network_leads_to_the_picture(prediction):
  """Euler steps are exact where the network always knows the one picture there is."""
  cfg = EulerDiscreteConfig(prediction=prediction)
  rng = np.random.default_rng(0)
  picture, noise = rng.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)

  def perfect(x, t):
    row = jnp.full((x.shape[0],), t.astype(jnp.int32))
    a = jnp.sqrt(jnp.asarray(alphas_cumprod(cfg), jnp.float32)[row])[:, None, None, None]
    seen_noise = (x - a * picture) / jnp.sqrt(1 - a**2)
    return training_target(cfg, jnp.asarray(picture), seen_noise, row)

  out = sample_euler_discrete(perfect, noise, cfg, steps=8, guidance=1.0)
  assert relative_error(out.latents, picture) < 1e-3
  assert out.states is None and out.predictions is None


@pytest.mark.parametrize("guidance, rows", [(0.0, 2), (1.0, 2), (2.0, 4)])
def test_one_branch_without_guidance(guidance, rows):
  def predict(x, t):
    assert x.shape[0] == rows
    return jnp.where(jnp.arange(rows) < 2, 1.0, 0.25)[:, None] * jnp.ones_like(x)  # cond first

  out = sample_euler_discrete(
    predict, np.zeros((2, 3)), EulerDiscreteConfig(), steps=4, guidance=guidance, trajectory=True
  )
  np.testing.assert_allclose(out.predictions, 0.25 + 2 * 0.75 if guidance > 1 else 1.0)


def test_the_state_stays_float32():
  noise = jnp.ones((1, 4), jnp.bfloat16)
  out = sample_euler_discrete(lambda x, t: x.astype(jnp.bfloat16), noise, EulerDiscreteConfig(), steps=3)
  assert out.latents.dtype == jnp.float32


def test_noise_and_v_target_invert():
  cfg = EulerDiscreteConfig(prediction="v_prediction")
  x, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
  t = jnp.array([0, 500, 999])
  noisy, v = add_noise(cfg, x, noise, t), training_target(cfg, x, noise, t)
  table = jnp.asarray(alphas_cumprod(cfg), jnp.float32)[t][:, None, None, None]
  assert relative_error(jnp.sqrt(table) * noisy - jnp.sqrt(1 - table) * v, x) < 1e-5
  assert relative_error(noisy[0], x[0]) < 0.1 and relative_error(noisy[2], noise[2]) < 0.1
  np.testing.assert_array_equal(training_target(EulerDiscreteConfig(), x, noise, t), noise)
  assert abs(alphas_cumprod(EulerDiscreteConfig())[0] - 0.99915) < 1e-6


def test_bad_requests():
  config = load_golden("sdxl_decoder").config["scheduler"]
  for change in ({"timestep_spacing": "trailing"}, {"timestep_type": "continuous"}, {"trained_betas": [0.1, 0.2]}):
    with pytest.raises(UserError, match=next(iter(change))):
      EulerDiscreteConfig.from_reference(config | change)
  with pytest.raises(UserError, match="prediction"):
    EulerDiscreteConfig(prediction="sample")
  for steps in (0, 1000):
    with pytest.raises(UserError, match="steps"):
      euler_tables(EulerDiscreteConfig(), steps)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams_bashforth", 2)])
def test_order_of_convergence(solver, order):
  """Normal data of deviation 0.5, whose paths are known: x over sqrt(0.25 + sigma^2) stays. The last step is left out:
  it leads to sigma 0 from where the training steps end, and more steps do not shorten it."""
  noise, errors = np.linspace(0.5, 2, 4, dtype=np.float32)[:, None], []
  for steps in (25, 50, 100):
    cfg = EulerDiscreteConfig()
    tables = euler_tables(cfg, steps)

    def epsilon(scaled, t, tables=tables):
      sigma = jnp.interp(t, tables.timesteps[::-1], tables.sigmas[:-1][::-1])
      return sigma * scaled * jnp.sqrt(sigma**2 + 1) / (0.25 + sigma**2)

    out = sample_euler_discrete(epsilon, noise, cfg, steps=steps, guidance=1.0, solver=solver, trajectory=True)
    first, last = tables.sigmas[0].astype(float), tables.sigmas[-2].astype(float)
    exact = noise * tables.init_noise_sigma * np.sqrt((0.25 + last**2) / (0.25 + first**2))
    errors.append(relative_error(out.states[-2], exact))
  orders = np.log2(np.divide(errors[:-1], errors[1:]))
  assert np.allclose(orders, order, atol=0.3), (errors, orders)


def test_guidance_in_an_interval_alone():
  """Times as shares of 1000: 751 and 501 are guided, 251 and 1 are not, and run on half the batch."""
  ran = []

  def predict(x, t):
    jax.debug.callback(lambda t, n=x.shape[0]: ran.append((float(t), n)), t, ordered=True)
    return jnp.where(jnp.arange(len(x)) < 2, 3.0, 1.0)[:, None] * jnp.ones_like(x)

  cfg = EulerDiscreteConfig()
  out = sample_euler_discrete(
    predict, jnp.zeros((2, 3)), cfg, steps=4, guidance=2.0, interval=(0.5, 1.0), trajectory=True
  )
  jax.effects_barrier()
  assert ran == [(751.0, 4), (501.0, 4), (251.0, 2), (1.0, 2)]
  assert out.predictions[:, 0, 0].tolist() == [5.0, 5.0, 3.0, 3.0]
