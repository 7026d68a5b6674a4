"""Names of slices, and abstract devices as the real ones will be."""

import importlib.metadata
import subprocess
import sys

import jax
import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.planning import topology


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v7:2x2", "v5e:2x2x1", ""])
def test_an_unknown_name_lists_the_known_ones(name):
  with pytest.raises(UserError, match=r"v4: .*4x4x4.*v5e: .*16x16.*v5p: .*v6e: "):
    topology.get(name)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(topology.importlib.metadata, "version", version)
  with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
    topology.get("v5e:2x2")


@pytest.mark.parametrize("name, chips", [("v4:2x2x2", 8), ("v5e:1x1", 1), ("v5e:16x16", 256), ("v5p:4x4x4", 64)])
def test_one_device_a_chip(name, chips):
  pytest.importorskip("libtpu")
  found = topology.get(name)
  assert len(found.devices) == chips and found.devices[0].platform == "tpu"
  mesh = found.mesh({"data": 1, "fsdp": -1}, batch_size=2 * chips)
  assert mesh.shape["fsdp"] == chips and mesh.devices.flat[0] in found.devices


def test_slices_have_an_axis_of_their_own():
  pytest.importorskip("libtpu")
  mesh = topology.get("v5e:2x4", slices=2).mesh({"data": 1, "fsdp": -1})
  assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 8, "tensor": 1}
  assert {d.slice_index for d in mesh.devices[0].flat} == {0}


@pytest.mark.parametrize(
  "name, slices, host", [("v5e:8x8", 2, "v5e:2x2"), ("v4:2x2x2", 1, "v4:2x2x1"), ("v6e:1x1", 1, "v6e:1x1")]
)
def test_a_host_is_what_the_compiler_says_it_is(name, slices, host):
  pytest.importorskip("libtpu")
  whole = topology.get(name, slices)
  own = [d for d in whole.devices if d.process_index == 0]
  found = whole.host()
  assert (found.name, found.slices, len(found.devices)) == (host, 1, len(own))


def test_nothing_is_said_on_the_terminal():
  """libtpu complains of a missing TPU, at the level of the process."""
  pytest.importorskip("libtpu")
  code = "from blip3o_jax.planning import topology; topology.get('v5e:2x2')"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_planning_leaves_the_devices_of_this_machine_alone():
  assert jax.devices()[0].platform == "cpu"
