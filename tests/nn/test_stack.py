"""Stacks of layers: written out for a gradient on a CPU, a loop everywhere else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from blip3o_jax.nn.linear import Dense
from blip3o_jax.nn.stack import scan_layers, written_out
from blip3o_jax.sharding.mesh import AXES


class Block(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    return x + nn.gelu(Dense(self.width, ("embed", "mlp"))(x)), None


class Stack(nn.Module):
  layers: int

  @nn.compact
  def __call__(self, x):
    return scan_layers(Block, self.layers)(8)(x)[0]


X = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)


def gradient(layers, written_out):
  params = nn.unbox(Stack(layers).init(jax.random.key(0), X)["params"])

  def loss(params):
    if not written_out:
      return jnp.sum(jnp.sin(Stack(layers).apply({"params": params}, X)))
    with written_out():
      return jnp.sum(jnp.sin(Stack(layers).apply({"params": params}, X)))

  compiled = jax.jit(jax.grad(loss)).lower(params).compile()
  return compiled.as_text().count(" while("), compiled(params)


def test_layers_of_a_gradient_are_written_out():
  (loops, expected), (none, found) = gradient(3, False), gradient(3, True)
  assert loops >= 2 and none == 0
  assert jax.tree.all(jax.tree.map(lambda a, b: relative_error(a, b) < 1e-5, found, expected))
  assert gradient(17, True)[0] >= 2  # deep: it would take too long to compile


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
