"""Layers against plain formulas."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers import relative_error
from jax.sharding import AbstractMesh

from blip3o_jax.nn import linear
from blip3o_jax.nn.attention import linear_attention
from blip3o_jax.nn.linear import Conv, Dense, DepthwiseConv, UpsampleConv
from blip3o_jax.nn.mlp import GLUMBConv, gelu
from blip3o_jax.nn.norms import RMSNorm
from blip3o_jax.planning import hlo, topology
from blip3o_jax.sharding import rules


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_params(module, x):
  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
  leaves, tree = jax.tree.flatten(shapes)
  return jax.tree.unflatten(tree, [normal(*p.shape, seed=i) for i, p in enumerate(leaves)])


@pytest.mark.parametrize("source", [3, 40])
def test_linear_attention_is_normalised_relu_attention(source):
  q, k, v = 1e-6 * normal(2, 5, 3, 4), normal(2, source, 3, 4, seed=1), normal(2, source, 3, 4, seed=2)
  scores = np.einsum("blhk,bshk->bhls", np.maximum(q, 0), np.maximum(k, 0))
  weights = scores / (scores.sum(axis=-1, keepdims=True) + 1e-15)
  assert relative_error(linear_attention(q, k, v), np.einsum("bhls,bshk->blhk", weights, v)) < 1e-5


def test_linear_attention_of_a_query_that_sees_nothing():
  k, v = normal(1, 6, 1, 4), normal(1, 6, 1, 4, seed=1)
  assert not np.asarray(linear_attention(-jnp.ones((1, 2, 1, 4)), k, v)).any()


def test_linear_attention_sums_in_float32():
  """4096 keys of 20 sum to more than float16 holds."""
  k, v = jnp.full((1, 4096, 1, 2), 20, jnp.float16), jnp.asarray(normal(1, 4096, 1, 2), jnp.float16)
  out = linear_attention(k[:, :1], k, v)
  assert out.dtype == jnp.float16
  np.testing.assert_allclose(out[0, 0, 0], np.asarray(v, np.float32).mean(axis=(0, 1, 2)), atol=1e-3)


@pytest.mark.parametrize("kernel_size, use_bias", [(3, True), (5, False)])
def test_depthwise_is_a_grouped_convolution(kernel_size, use_bias):
  module, x = DepthwiseConv(kernel_size, use_bias), normal(2, 6, 4, 3)
  params = random_params(module, x)
  same = kernel_size // 2
  expected = jax.lax.conv_general_dilated(
    x,
    params["kernel"],
    (1, 1),
    [(same, same)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=3,
  )
  assert set(params) == ({"kernel", "bias"} if use_bias else {"kernel"})
  assert relative_error(module.apply({"params": params}, x), expected + params.get("bias", 0)) < 1e-5


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype, bar", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_upsampling_convolution(dtype, bar, platform, monkeypatch):
  """That of the pixels repeated, its gradients as well; and fewer operations."""
  monkeypatch.setattr(linear, "target_platform", lambda: platform)
  x = jax.random.normal(jax.random.key(0), (2, 9, 7, 4))
  plain, quick = Conv(6, dtype=dtype), UpsampleConv(6, dtype=dtype)
  params = jax.tree.map(lambda leaf: leaf + 0.1, plain.init(jax.random.key(1), x))
  assert jax.tree.map(jnp.shape, quick.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, params)

  def repeated(params, x):
    return plain.apply(params, x.repeat(2, axis=1).repeat(2, axis=2))

  assert quick.apply(params, x).dtype == dtype
  assert relative_error(quick.apply(params, x), repeated(params, x)) < bar
  wave = lambda f: jax.grad(lambda *given: jnp.sum(jnp.sin(f(*given))), (0, 1))(params, x)
  for got, want in zip(jax.tree.leaves(wave(quick.apply)), jax.tree.leaves(wave(repeated)), strict=True):
    assert relative_error(got, want) < bar
  work = [jax.jit(f).lower(params, x).cost_analysis()["flops"] for f in (quick.apply, repeated)]
  assert work[0] < 0.75 * work[1]
  assert ("lhs_dilation=(2, 2)" in str(jax.make_jaxpr(quick.apply)(params, x))) == (platform == "tpu")


def test_upsampling_to_an_odd_size():
  """The picture is cut before the convolution, so that its edge sees zeros."""
  x, layer = normal(2, 3, 4, 5), UpsampleConv(6, size=(5, 8))
  params = random_params(layer, x)
  large = x.repeat(2, axis=1).repeat(2, axis=2)[:, :5]
  assert relative_error(layer.apply({"params": params}, x), Conv(6).apply({"params": params}, large)) < 1e-5


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu(approximate):
  x = np.linspace(-9, 9, 4001)
  inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
  expected = 0.5 * x * (1 + (np.tanh(inner) if approximate else scipy.special.erf(x / np.sqrt(2))))
  exact = gelu(jnp.asarray(x, jnp.float32), approximate=approximate)
  assert np.abs(exact - expected).max() < 2e-6
  short = jnp.asarray(x, jnp.bfloat16)
  once = gelu(short.astype(jnp.float32), approximate=approximate).astype(jnp.bfloat16)
  np.testing.assert_array_equal(gelu(short, approximate=approximate), once)


@pytest.mark.parametrize(
  "layer, shape, whole",
  [
    (Dense(16, ("embed", "mlp")), (4, 2, 8), "(None, UNCONSTRAINED)"),
    (Dense(16, ("heads", "embed")), (4, 2, 8), "(UNCONSTRAINED, None)"),
    (Dense(16, ("embed", "mlp")), (4, 1, 8), None),  # too few rows
    (Dense(16, (None, "mlp")), (4, 2, 8), None),  # not cut over what shares the batch
    (Conv(16), (4, 2, 2, 8), "(UNCONSTRAINED, UNCONSTRAINED, UNCONSTRAINED, None)"),
    (Conv(16, axes=("conv_in", None)), (4, 2, 2, 8), None),
    (UpsampleConv(16), (4, 2, 2, 8), "(UNCONSTRAINED, UNCONSTRAINED, UNCONSTRAINED, None)"),
  ],
)
def test_kernels_are_gathered_from_where_they_are_only_stored(layer, shape, whole):
  x = jnp.ones(shape)
  params = nn.unbox(layer.init(jax.random.key(0), x))
  for fsdp, expected in ((4, whole), (1, None)):
    mesh = AbstractMesh((fsdp, 2), ("fsdp", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(rules.RULES):
      text = str(jax.make_jaxpr(layer.apply)(params, x))
    assert text.count("sharding_constraint") == bool(expected), text
    assert expected is None or expected in text, text


def test_a_gathered_kernel_is_not_kept_for_the_gradient(capsys):
  """They would be the whole weights of all layers. And no product is computed twice."""
  layer, x = Dense(16), jnp.ones((32, 8))
  params = nn.unbox(layer.init(jax.random.key(0), x))
  wave = lambda params, x: jnp.sum(jnp.sin(layer.apply(params, x)))
  with jax.sharding.use_abstract_mesh(AbstractMesh((4,), ("fsdp",))), nn.logical_axis_rules(rules.RULES):
    jax.ad_checkpoint.print_saved_residuals(wave, params, x)
    text = str(jax.make_jaxpr(jax.grad(wave, (0, 1)))(params, x))
  kept = capsys.readouterr().out
  assert "f32[8,16] from the argument params" in kept and "sharding_constraint" not in kept, kept
  assert text.count("dot_general[") == 3 and text.count("sharding_constraint[") == 2, text  # none for the kernel's own


def test_a_tpu_passes_no_pieces_of_a_kernel_around():
  """Its own partitioner would multiply by a quarter of the inputs at a time."""
  pytest.importorskip("libtpu")
  mesh = topology.get("v5e:2x2").mesh({"fsdp": 4})
  layer = Dense(4096, ("embed", "mlp"), dtype="bfloat16", param_dtype="bfloat16")
  x = jax.ShapeDtypeStruct((8, 1024, 512), "bfloat16", sharding=rules.batch_sharding(mesh))
  params = rules.placed(mesh, jax.eval_shape(layer.init, jax.random.key(0), x))
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules.RULES):
    compiled = jax.jit(layer.apply, out_shardings=rules.batch_sharding(mesh)).lower(params, x).compile()
  assert {(c.kind, c.size) for c in hlo.collectives(compiled.as_text(), mesh)} == {("all-gather", 2 * 512 * 4096)}


def test_gated_convolution():
  module, x = GLUMBConv(6), normal(1, 3, 3, 4)
  params = random_params(module, x)
  silu = lambda z: z / (1 + np.exp(-z))
  y = silu(x @ params["widen"]["kernel"] + params["widen"]["bias"])
  y = np.asarray(DepthwiseConv().apply({"params": params["depthwise"]}, y))
  expected = (y[..., :6] * silu(y[..., 6:])) @ params["narrow"]["kernel"]
  assert set(params["narrow"]) == {"kernel"}
  assert relative_error(module.apply({"params": params}, x), expected) < 1e-5


def test_rms_norm_with_a_bias():
  module, x = RMSNorm(1e-3, use_bias=True), normal(2, 5)
  params = random_params(module, x)
  expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-3) * params["scale"] + params["bias"]
  assert relative_error(module.apply({"params": params}, x), expected) < 1e-6
  assert set(random_params(RMSNorm(), x)) == {"scale"}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the CPU compiler")
def test_gradient_of_an_upsampling_convolution_has_no_reversed_window():
  """A reversed window has no fast convolution on a CPU: it took more than half of a training step of the decoder."""
  layer, x = UpsampleConv(16), normal(2, 8, 8, 16)
  gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(layer.apply({"params": p}, x)))))
  assert "rhs_reversal" not in gradient.lower(random_params(layer, x)).compile().as_text()
