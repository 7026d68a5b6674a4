"""Logical names to mesh axes, the mesh itself, and starting up."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from blip3o_jax.errors import UserError
from blip3o_jax.sharding import rules
from blip3o_jax.sharding.mesh import make_mesh

MESH = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("names, shape, expected", [
  (("embed", "mlp"), (8, 6), PartitionSpec("fsdp", "tensor")),
  (("layers", "embed", "heads"), (5, 8, 6), PartitionSpec(None, "fsdp", "tensor")),
  (("embed", "mlp"), (6, 8), PartitionSpec(None, "tensor")),  # 4 does not divide 6
  (("embed", "embed"), (8, 8), PartitionSpec("fsdp", None)),  # an axis is used once
  (("batch", "length", "act_mlp"), (16, 3, 4), PartitionSpec(("data", "fsdp"), None, "tensor")),
  ((None, "norm"), (8, 8), PartitionSpec(None, None)),
])  # fmt: skip
def test_spec(names, shape, expected):
  assert rules.spec(MESH, names, shape) == expected


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
  assert mesh.axis_names == ("data", "fsdp", "tensor") and set(mesh.axis_types) == {AxisType.Auto}
  for sizes in ({"data": 0}, {"data": -1, "fsdp": -1}, {"data": 3 * jax.device_count()}, {"model": 2}):
    with pytest.raises(UserError, match="mesh"):
      make_mesh(sizes)


_FOUR = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from blip3o_jax.errors import UserError
from blip3o_jax.sharding.mesh import make_mesh
assert dict(make_mesh({"data": -1, "fsdp": 2}, batch_size=8).shape) == {"data": 2, "fsdp": 2, "tensor": 1}
assert dict(make_mesh(None, batch_size=6).shape)["data"] == 3
assert dict(make_mesh(None, batch_size=1).shape)["data"] == 1
assert dict(make_mesh({"data": 1, "tensor": 2}).shape) == {"data": 1, "fsdp": 1, "tensor": 2}
for sizes, kwargs in [({"data": 4}, {"batch_size": 6}), ({"data": 2}, {"devices": jax.devices()})]:
  try:
    make_mesh(sizes, **kwargs)
  except UserError:
    continue
  raise AssertionError(sizes)
"""

_START = """
import os, jax
from blip3o_jax.sharding import distributed
distributed.start()
distributed.start()
assert jax.device_count() == len(os.sched_getaffinity(0)), jax.devices()
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
