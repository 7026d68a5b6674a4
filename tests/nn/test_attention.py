"""Attention: what may attend, said in three ways, and the TPU kernel (interpreted) against plain attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import AbstractMesh

from blip3o_jax.nn import attention as module
from blip3o_jax.nn.attention import attention, plain_attention, splash_attention
from blip3o_jax.nn.target import target_platform


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(length, slots, heads=2, groups=1, size=16, batch=2):
  kv = batch, slots, groups, size
  return normal(batch, length, heads, size), normal(*kv, seed=1), normal(*kv, seed=2)


def segments(length, slots):
  """Two segments a row, of other lengths in the second row; every query finds a key."""
  cut = np.asarray([[slots // 2], [slots // 3]])
  keys = (np.arange(slots) >= cut).astype(np.int32)
  return keys[:, slots - length :], keys


def test_causal_and_segments_are_masks():
  q, k, v = inputs(5, 9)
  numbers = segments(5, 9)
  seen = np.arange(9)[None, :] <= np.arange(4, 9)[:, None]
  mask = seen[None] & (numbers[0][:, :, None] == numbers[1][:, None, :])
  expected = attention(q, k, v, mask[:, None])
  np.testing.assert_array_equal(attention(q, k, v, causal=True, segments=numbers), expected)
  np.testing.assert_array_equal(attention(q, k, v, seen[None, None], segments=numbers), expected)
  # By hand, for one query: the third of row 1 is place 6 of 9, and its segment begins at 3.
  scores = q[1, 2, 0] @ k[1, 3:7, 0].T / 4
  weights = np.exp(scores) / np.exp(scores).sum()
  assert relative_error(expected[1, 2, 0], weights @ v[1, 3:7, 0]) < 1e-6


@pytest.mark.parametrize("length, slots, causal", [(130, 200, True), (128, 140, False)])
def test_the_kernel_computes_attention(length, slots, causal):
  """Forward and backward, with lengths that are no whole lanes, grouped heads and segments."""
  q, k, v = inputs(length, slots)
  numbers = segments(length, slots)
  weight = normal(*q.shape, seed=3)
  kernel = lambda q, k, v: splash_attention(q, k, v, numbers, causal=causal, scale=0.3, interpret=True)
  plain = lambda q, k, v: attention(q, k, v, causal=causal, segments=numbers, scale=0.3)
  run = lambda f: jax.jit(jax.value_and_grad(lambda *x: (jnp.sum(f(*x) * weight), f(*x)), (0, 1, 2), has_aux=True))
  ((_, out), grads), ((_, right), right_grads) = run(kernel)(q, k, v), run(plain)(q, k, v)
  assert relative_error(out, right) < 1e-5
  for ours, theirs in zip(grads, right_grads, strict=True):
    assert relative_error(ours, theirs) < 1e-5


def test_padding_of_the_kernel_is_never_seen():
  q, k, v = inputs(129, 129)
  out = splash_attention(q, k, v, scale=0.25, interpret=True)
  assert relative_error(out, plain_attention(q, k, v, None, scale=0.25)) < 1e-5


def test_the_kernel_is_for_long_sequences_on_a_tpu(monkeypatch):
  used = []
  monkeypatch.setattr(module, "_on_mesh", lambda kernel, q, *_: used.append(q.shape[1]) or q)
  q, k, v = inputs(128, 128)
  attention(q, k, v)
  assert target_platform() == "cpu" and used == []
  monkeypatch.setattr(module, "target_platform", lambda: "tpu")
  attention(q, k, v, causal=True)
  attention(q[:, :64], k, v)  # shorter than a block of the kernel
  attention(q, k, v, np.ones((1, 1, 128, 128), bool))  # a mask that the kernel does not know
  assert used == [128]


@pytest.mark.parametrize("given", ["mask", "segments"])
def test_long_sequences_take_some_rows_at_a_time(monkeypatch, given):
  """The same numbers and gradients, with a last block that is not full, and never the logits of all rows."""
  q, k, v = inputs(37, 41, heads=4, groups=2)
  said = {"causal": True, "segments": segments(37, 41)} if given == "segments" else {"mask": normal(2, 4, 37, 41) > 0}
  weight = normal(*q.shape, seed=3)
  run = lambda: jax.jit(jax.value_and_grad(lambda *x: jnp.sum(attention(*x, **said) * weight), (0, 1, 2))).lower(
    q, k, v
  )
  plain = run()
  monkeypatch.setattr(module, "_LONG", 0)
  monkeypatch.setattr(module, "_LOGITS", 2 * 4 * 10 * 41)
  blocked = run()
  assert ",37,41]" in plain.compile().as_text() and ",37,41]" not in blocked.compile().as_text()
  for ours, theirs in zip(*(jax.tree.leaves(lowered.compile()(q, k, v)) for lowered in (blocked, plain)), strict=True):
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("segmented, kind", [(True, "fmhaScaleBiasSoftmax"), (False, "fmhaSoftmax")])
def test_cudnn_is_asked_for_what_it_takes(monkeypatch, segmented, kind):
  """Lowered for CUDA on a machine without. What the kernels give is for the trial on the GPU itself."""
  fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
  q, k = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
  numbers = (jax.ShapeDtypeStruct((2, 256), jnp.int32),) * 2 if segmented else None
  value = lambda q, k, v, n: jnp.sum(module.cudnn_attention(q, k, v, n, causal=True, scale=0.1))
  text = jax.jit(jax.grad(value, (0, 1, 2))).trace(q, k, k, numbers).lower(lowering_platforms=("cuda",)).as_text()
  assert f"__cudnn${kind}(" in text and f"__cudnn${kind}Backward(" in text


def test_cudnn_is_not_believed_without_a_trial(monkeypatch):
  """Here it fails, so a GPU program has plain attention; where it succeeds, the kernel."""
  used = []
  monkeypatch.setattr(module, "target_platform", lambda: "gpu")
  monkeypatch.setattr(module, "_on_mesh", lambda kernel, q, *_: used.append(kernel.func) or q)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(128, 128))
  plain = attention(q, k, v)
  assert used == [] and plain.shape == q.shape
  monkeypatch.setattr(module, "cudnn_attention", lambda q, k, v, _, **settings: attention(q, k, v, **settings))
  module.cudnn_agrees.cache_clear()
  monkeypatch.setattr(module, "target_platform", lambda: "cpu")
  assert module.cudnn_agrees(q.shape[1:], k.shape[1:], "bfloat16", False, False)
  monkeypatch.setattr(module, "target_platform", lambda: "gpu")
  attention(q, k, v)
  module.cudnn_agrees.cache_clear()
  assert used == [module.cudnn_attention]


def test_the_platform_is_that_of_the_mesh():
  """Not of this machine: a program may be compiled for another."""
  for kind, platform in (("TPU v5 lite", "tpu"), ("NVIDIA H100", "gpu"), ("cpu", "cpu")):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
      assert target_platform() == platform
