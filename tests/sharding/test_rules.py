"""Logical names to mesh axes, the mesh itself, and starting up."""

import os
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from blip3o_jax.errors import UserError
from blip3o_jax.sharding import rules
from blip3o_jax.sharding.mesh import AXES, make_mesh, reader

MESH = AbstractMesh((3, 2, 4, 2), ("slice", "data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize("names, shape, expected", [
  (("embed", "mlp"), (8, 6), PartitionSpec("fsdp", "tensor")),
  (("layers", "embed", "heads"), (5, 8, 6), PartitionSpec(None, "fsdp", "tensor")),
  (("embed", "mlp"), (6, 8), PartitionSpec(None, "tensor")),  # 4 does not divide 6
  (("embed", "embed"), (8, 8), PartitionSpec("fsdp", None)),  # an axis is used once
  (("batch", "length", "act_mlp"), (48, 3, 4), PartitionSpec(("slice", "data", "fsdp"), None, "tensor")),
  ((None, "norm"), (8, 8), PartitionSpec(None, None)),
])  # fmt: skip
def test_spec(names, shape, expected):
  assert rules.spec(MESH, names, shape) == expected


def test_layers_can_be_spread():
  names = ("layers", "embed", "heads")
  assert rules.spec(MESH, names, (6, 8, 6), layers="data") == PartitionSpec("data", "fsdp", "tensor")
  assert rules.spec(MESH, names, (5, 8, 6), layers="data") == PartitionSpec(None, "fsdp", "tensor")


def test_unknown_name_is_a_bug():
  with pytest.raises(ValueError, match="embedd"):
    rules.spec(MESH, ("embedd",), (8,))


def test_shardings_of_boxed_trees():
  boxed = {
    "kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8, 8), jnp.float32), ("embed", "mlp")),
    "count": jax.ShapeDtypeStruct((), jnp.int32),
  }
  out = rules.shardings(make_mesh({"data": 1}), boxed)
  assert out["kernel"].spec == PartitionSpec("fsdp", "tensor") and out["count"].spec == PartitionSpec()


def test_mesh():
  mesh = make_mesh({"data": -1})
  assert mesh.axis_names == ("slice", "data", "fsdp", "tensor") and set(mesh.axis_types) == {AxisType.Auto}
  for sizes in ({"data": 0}, {"data": -2}, {"data": -1, "fsdp": -1}, {"data": 3 * jax.device_count()}, {"model": 2}):
    with pytest.raises(UserError, match="mesh"):
      make_mesh(sizes)


class Chip(types.SimpleNamespace):
  """What make_mesh asks of a TPU chip: numbered in its slice as a pod of 4 x 2 chips, 4 on a host."""

  __hash__ = object.__hash__

  def __init__(self, i, per_slice=8):
    n = i % per_slice
    super().__init__(
      id=i, process_index=i // 4, slice_index=i // per_slice, platform="tpu", device_kind="TPU v5e",
      coords=(n // 2, n % 2, 0), core_on_chip=0, num_cores=1,
    )  # fmt: skip


def test_slices():
  """The slow network carries the outermost axis alone, found from the devices."""
  chips = [Chip(i) for i in range(16)]
  mesh = make_mesh({"data": 2, "fsdp": -1}, batch_size=32, devices=chips)
  assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 4, "tensor": 1}
  assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
  assert {d.id for d in mesh.devices.flat} == set(range(16))
  with pytest.raises(UserError, match="mesh.slice is 1 for devices of 2 slices"):
    make_mesh({"slice": 1}, devices=chips)
  assert dict(make_mesh({"slice": 2, "data": 4}, devices=chips[:8]).shape)["slice"] == 2  # one slice, cut by hand


def test_who_reads_which_rows():
  """Hosts that hold the same rows, because `tensor` is wider than a host, read the same part of a batch."""
  chips = [Chip(i) for i in range(16)]
  parts = lambda **sizes: [reader(make_mesh(sizes, devices=chips), p) for p in range(4)]
  assert parts(data=8) == [(0, 4), (1, 4), (2, 4), (3, 4)]
  assert parts(data=1, tensor=8) == [(0, 2), (0, 2), (1, 2), (1, 2)]
  assert parts(data=4, tensor=2) == [(0, 4), (1, 4), (2, 4), (3, 4)]
  assert parts(data=2, tensor=4) == [(0, 2), (0, 2), (1, 2), (1, 2)]  # not the 2 x 2 of a host, but a line of chips
  uneven = np.asarray([[chips[0], chips[1]], [chips[4], chips[2]], [chips[5], chips[6]], [chips[3], chips[7]]])
  with pytest.raises(UserError, match="the 2 processes cannot share"):
    reader(jax.sharding.Mesh(uneven.reshape(1, 4, 1, 2), AXES), 0)


def test_a_batch_that_does_not_divide_is_told_the_nearest():
  chips = [Chip(i) for i in range(8)]
  for batch, parts, words in [(30, 1, "24 and 32"), (5, 1, "8 and 16"), (32, 3, "24 and 48")]:
    with pytest.raises(UserError, match=f"the nearest that do are {words}"):
      make_mesh(None, batch_size=batch, parts=parts, devices=chips)


_FOUR = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from blip3o_jax.errors import UserError
from blip3o_jax.sharding.mesh import make_mesh
assert dict(make_mesh({"data": -1, "fsdp": 2}, batch_size=8).shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 1}
assert dict(make_mesh(None, batch_size=6).shape)["data"] == 3
assert dict(make_mesh(None, batch_size=8, parts=4).shape)["data"] == 2
assert dict(make_mesh({"slice": 2}).shape)["data"] == 2
assert dict(make_mesh(None, batch_size=1).shape)["data"] == 1
assert dict(make_mesh({"data": 1, "tensor": 2}).shape) == {"slice": 1, "data": 1, "fsdp": 1, "tensor": 2}
for sizes, kwargs in [({"data": 4}, {"batch_size": 6}), ({"data": 2}, {"devices": jax.devices()})]:
  try:
    make_mesh(sizes, **kwargs)
  except UserError:
    continue
  raise AssertionError(sizes)
"""

_START = """
import jax
from blip3o_jax.sharding import distributed
distributed.start()
distributed.start()
assert jax.device_count() == 1, jax.devices()
distributed.barrier("here")
"""

_DECIDED = """
import jax
jax.config.update("jax_num_cpu_devices", 3)
from blip3o_jax.sharding import distributed
distributed.start()
assert jax.device_count() == 3
distributed.start()
"""

_LATE = """
import jax
n = jax.device_count()
from blip3o_jax.sharding import distributed
distributed.start()
assert jax.device_count() == n
"""


@pytest.mark.parametrize("code", [_FOUR, _START, _DECIDED, _LATE], ids=["four", "start", "decided", "late"])
def test_in_a_fresh_process(code):
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env())
  assert done.returncode == 0, done.stderr[-2000:]


def test_half_a_job_description_is_refused():
  code = "from blip3o_jax.sharding import distributed; distributed.start()"
  env = _env() | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
  assert "UserError" in done.stderr and "JAX_NUM_PROCESSES" in done.stderr


def _env():
  return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
    "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)
  }
