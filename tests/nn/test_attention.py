"""Attention: what may attend, said in three ways, and the TPU kernel (interpreted) against plain attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import AbstractMesh

from blip3o_jax.nn import attention as module
from blip3o_jax.nn.attention import attention, plain_attention, splash_attention, target_platform


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


def test_the_platform_is_that_of_the_mesh():
  """Not of this machine: a program may be compiled for another."""
  for kind, platform in (("TPU v5 lite", "tpu"), ("NVIDIA H100", "gpu"), ("cpu", "cpu")):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
      assert target_platform() == platform
