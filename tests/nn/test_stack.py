"""Stacks of layers: written out for a gradient on a CPU, a loop everywhere else."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from blip3o_jax.nn.linear import Dense
from blip3o_jax.nn.stack import for_loop, scan_layers, written_out
from blip3o_jax.sharding.mesh import AXES


class Block(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    return x + nn.gelu(Dense(self.width, ("embed", "mlp"))(x)), None


class Stack(nn.Module):
  layers: int
  remat: str = "none"

  @nn.compact
  def __call__(self, x):
    return scan_layers(Block, self.layers, remat=self.remat)(8, name="layers")(x)[0]


X = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)


def gradient(layers, context, remat="none"):
  """(loops of the compiled program, the gradient)"""
  params = nn.unbox(Stack(layers, remat).init(jax.random.key(0), X)["params"])

  def loss(params):
    with context:
      return jnp.sum(jnp.sin(Stack(layers, remat).apply({"params": params}, X)))

  compiled = jax.jit(jax.grad(loss)).lower(params).compile()
  return compiled.as_text().count(" while("), compiled(params)


def test_layers_of_a_gradient_are_written_out():
  (loops, expected), (none, found) = gradient(3, contextlib.nullcontext()), gradient(3, written_out(gradient=True))
  assert loops >= 2 and none == 0
  assert jax.tree.all(jax.tree.map(lambda a, b: relative_error(a, b) < 1e-5, found, expected))
  assert gradient(17, written_out(gradient=True))[0] >= 2  # deep: it would take too long to compile
  assert gradient(3, written_out(gradient=True), "full")[0] >= 2


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_loop_copies_no_layers(remat):
  params = nn.unbox(Stack(3, remat).init(jax.random.key(0), X)["params"])

  def run(params, apart):
    parts, whole = for_loop(params) if apart else (params, lambda parts: parts)
    with written_out() if apart else contextlib.nullcontext():
      step = lambda i, x: Stack(3, remat).apply({"params": whole(parts)}, jnp.sin(x))
      return jax.lax.fori_loop(0, 5, step, X)

  plain, apart = (jax.jit(run, static_argnums=1).lower(params, apart).compile() for apart in (False, True))
  carried = lambda compiled: [line for line in compiled.as_text().splitlines() if " while(" in line][-1]
  assert "[3,8,8]" in carried(plain) and "[3,8,8]" not in carried(apart)
  assert "dynamic-slice" not in apart.as_text() and "concatenate" not in apart.as_text()
  assert relative_error(apart(params), plain(params)) < 1e-5


@pytest.mark.parametrize(
  "shape, kind, unroll", [((1, 2, 1, 1), "cpu", 3), ((1, 1, 2, 1), "cpu", 1), ((1, 2, 1, 1), "TPU v5 lite", 1)]
)
def test_only_where_every_cpu_device_has_the_whole(shape, kind, unroll):
  """Where layers are cut up they would be sent one by one, and a TPU gains by short programs."""
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=kind[:3].lower())
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(shape, AXES, abstract_device=device)), written_out():
    jaxpr = jax.make_jaxpr(lambda x: Stack(3).init_with_output(jax.random.key(0), x)[0])(X)
  (scan,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
  assert scan.params["unroll"] == unroll
