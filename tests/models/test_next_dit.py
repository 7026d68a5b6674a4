"""The diffusion transformer against the recordings of the reference, and its published sizes."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.next_dit import NextDiT, NextDiTConfig, rope_phases
from blip3o_jax.nn import rope
from blip3o_jax.porting import convert
from blip3o_jax.porting.rules import next_dit as rules

RECORDINGS = ("next_dit", "next_dit_gqa", "next_dit_patch2")
INPUTS = {"x", "timestep", "z_latents"}
PAPER = NextDiTConfig(
  in_channels=6, grid=4, dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=96, condition_dim=24, rope="concatenated"
)


def from_recording(name):
  golden = load_golden(name)
  cfg = NextDiTConfig.from_reference(golden.config, {k: v.shape for k, v in golden.weights.items()})
  model, x = NextDiT(cfg), golden.io["x"].transpose(0, 2, 3, 1)
  inputs = x, golden.io["timestep"], golden.io["z_latents"]
  abstract = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
  return golden, model, convert.to_ours(rules.RULES, golden.weights, abstract), inputs


@functools.cache
def paper_params():
  """Fresh parameters of PAPER, and inputs."""
  cfg, keys = PAPER, jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, *cfg.grid, cfg.in_channels))
  condition = jax.random.normal(keys[1], (2, 5, cfg.condition_dim))
  inputs = x, jnp.array([900.0, 33.0]), condition
  return nn.unbox(jax.jit(NextDiT(cfg).init)(keys[2], *inputs))["params"], inputs


def random_model(remat="none", dtype=jnp.float32):
  """The same with the gates open, so that the condition matters; a function that applies the model."""
  model = NextDiT(dataclasses.replace(PAPER, remat=remat), dtype=dtype)
  params, inputs = paper_params()
  gate = jnp.linspace(-1.0, 1.0, PAPER.layers * PAPER.heads).reshape(PAPER.layers, PAPER.heads)
  params = params | {"layers": params["layers"] | {"gate": gate}}
  run = functools.partial(jax.jit, static_argnames="method")(
    lambda p, *a, method=None: model.apply({"params": p}, *a, method=method)
  )
  return run, params, inputs


@functools.cache
def gradients(remat):
  run, params, inputs = random_model(remat)
  grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(run(p, *inputs)))))(params)
  return convert.flatten(grads)


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_recorded_array(name):
  golden, model, params, (x, t, z) = from_recording(name)

  def loss(params, z):
    output, state = model.apply({"params": params}, x, t, z, mutable=["intermediates"])
    return jnp.mean(jnp.square(output)), (output, state["intermediates"])

  (value, (output, seen)), (grads, grad_z) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, z)
  layers = {k: v[0] for k, v in seen["layers"].items()}
  grid = golden.io["freqs_cis_real"].shape
  ours = {
    "output": output.transpose(0, 3, 1, 2),
    "loss": value,
    "grad_z_latents": grad_z,
    "freqs_cis_real": jnp.cos(seen["phase"][0]).reshape(grid),
    "freqs_cis_imag": jnp.sin(seen["phase"][0]).reshape(grid),
    "act_caption_proj": seen["caption_proj"][0],
    "act_time_freq": seen["time_freq"][0],
    "act_temb": seen["temb"][0],
    "act_block0_self_attn_heads": layers["self_attn_heads"][0],
    "act_block0_cross_attn_heads": layers["cross_attn_heads"][0],
    "act_block0_out": layers["block_out"][0],
    "act_block_last_out": layers["block_out"][-1],
  }
  ours |= {f"grad:{key}": array for key, array in convert.to_reference(rules.RULES, grads)}
  expected = {k: v for k, v in golden.io.items() if k not in INPUTS}
  assert any(k.startswith("grad:") for k in expected) and not set(expected) - set(ours)
  errors = {k: relative_error(ours[k], v) for k, v in expected.items()}
  over = {k: e for k, e in errors.items() if e >= (1e-3 if k.startswith("grad") else 1e-4)}
  assert not over, over


@pytest.mark.parametrize("name", RECORDINGS)
def test_weights_survive_the_way_there_and_back(name):
  golden, _, params, _ = from_recording(name)
  back = dict(convert.to_reference(rules.RULES, params))
  assert set(back) == set(golden.weights)
  assert all(np.array_equal(back[k], golden.weights[k]) for k in back)


@pytest.mark.parametrize("name", RECORDINGS)
def test_feed_forward_width_with_and_without_the_weights(name):
  golden = load_golden(name)
  assert NextDiTConfig.from_reference(golden.config).ffn_dim == golden.config["ffn_inner_dim"]
  shapes = {"model.dit.model.layers.0.feed_forward.linear_1.weight": (7168, 1792)}
  assert NextDiTConfig.from_reference(golden.config, shapes).ffn_dim == 7168


@pytest.mark.parametrize("remat", ["none", "full"])
def test_projected_condition_changes_nothing(remat):
  run, params, (x, t, z) = random_model(remat)
  plain = run(params, x, t, z)
  projected = run(params, z, method="project")
  assert projected.keys.shape == (2, 2, 5, 2, 16)
  assert relative_error(run(params, x, t, None, projected), plain) < 1e-6
  other = jax.tree.map(lambda a, axis: jnp.flip(a, axis), projected, type(projected)(0, 1, 1))  # the rows exchanged
  assert relative_error(run(params, x, t, None, other), plain) > 1e-2


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(remat):
  ours, plain = gradients(remat), gradients("none")
  assert all(relative_error(ours[k], plain[k]) < 1e-5 for k in plain)


def test_a_fresh_model_starts_as_the_reference_does():
  params, _ = paper_params()
  assert not params["layers"]["gate"].any()
  for leaf in ("kernel", "bias"):
    modulation = np.asarray(params["layers"]["modulation"][leaf]) * PAPER.time_dim**0.5
    assert 0.95 < np.abs(modulation).max() <= 1 and abs(modulation.std() - 3**-0.5) < 0.05
  gate = np.asarray(params["layers"]["mlp"]["gate"]["kernel"]) * PAPER.dim**0.5
  assert np.abs(gate).max() <= 1 and not np.array_equal(gate[0], gate[1])


def test_three_axis_table():
  """Each axis has its own channels; a picture's time is 0; attention depends on differences of position alone."""
  phase = np.asarray(rope_phases(PAPER, 3, 5))
  assert phase.shape == (15, 8) and phase.dtype == np.float32
  assert PAPER.split == (4, 6, 6)
  row, col = np.divmod(np.arange(15), 5)
  assert not phase[:, :2].any()
  frequency = 1e4 ** (-2 * np.arange(3) / 6)
  assert np.allclose(phase[:, 2:5], row[:, None] * frequency) and np.allclose(phase[:, 5:], col[:, None] * frequency)

  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
  turn = lambda v, *position: rope.rotate_pairs(
    v, rope.phases(jnp.array([[position]]), *rope.concatenated_channels(PAPER.split))
  )
  dot = lambda a, b: float(jnp.sum(turn(q, *a) * turn(k, *b)))
  assert abs(dot((1, 2, 3), (4, 4, 4)) - dot((3, 5, 9), (6, 7, 10))) < 1e-5
  for axis in range(3):
    moved = tuple(3 * (a == axis) for a in range(3))
    assert abs(dot(moved, (0, 0, 0)) - dot((0, 0, 0), (0, 0, 0))) > 1e-3


def test_default_split_of_the_release_head_size():
  assert presets.get("blip3o-8b", {"dit": {"rope": "concatenated"}}).dit.split == (16, 24, 24)


def test_bad_configs_are_told():
  for change in ({"rope_split": (4, 4, 4)}, {"rope_split": (5, 5, 6)}, {"rope": "3d"}, {"heads": 3}, {"kv_heads": 3}):
    with pytest.raises(UserError, match="DiT"):
      dataclasses.replace(PAPER, **change)


def test_bfloat16_stays_close_and_returns_its_dtype():
  run, params, inputs = random_model()
  low = random_model(dtype=jnp.bfloat16)[0](params, *inputs)
  assert low.dtype == jnp.bfloat16
  assert relative_error(low.astype(jnp.float32), run(params, *inputs)) < 0.05


@pytest.mark.parametrize(("preset", "count"), [("blip3o-8b", 1_365_010_336), ("blip3o-4b", 1_362_257_824)])
def test_published_size(preset, count):
  cfg = presets.get(preset).dit
  inputs = jnp.zeros((1, *cfg.grid, cfg.in_channels)), jnp.zeros((1,)), jnp.zeros((1, 64, cfg.condition_dim))
  init = nn.unbox(jax.eval_shape(NextDiT(cfg).init, jax.random.key(0), *inputs))["params"]
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(init)) == count
  assert len(convert.reference_specs(rules.RULES, init)) == 642
