"""TPU slices by name, without one: what a chip can do, and abstract devices that the real TPU compiler takes.

A name is GENERATION:SHAPE in chips, as Google Cloud writes shapes: v5e:16x16, v4:4x4x4.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
import sys
from collections.abc import Mapping

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from blip3o_jax.errors import UserError
from blip3o_jax.sharding.mesh import make_mesh
from blip3o_jax.training.throughput import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the vendor states for one chip.

  Attributes:
    kind: what JAX calls it. hbm_bandwidth: bytes a second.
    hbm: bytes that a program may use, as the compiler says when it refuses one (libtpu 0.0.52): a little less than is
      sold.
    ici_bandwidth: bytes a second that a chip can send over all its links (half of the "bidirectional" figure).
    dcn_bandwidth: the same to other slices, a host's network cards shared by its chips. For v4 and v5p none is
      published; 200 Gbit/s a host of 4 chips is assumed.
    shapes: slices that can be rented, in chips; source: of all but `hbm` and what is assumed.
  """

  kind: str
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  shapes: tuple[str, ...]
  source: str
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def flops(self) -> float:
    """bfloat16 operations a second."""
    return PEAK_FLOPS[self.kind]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_HOST = 4  # chips, as libtpu cuts every slice of more
_MEGACORE = {"chip_config_name": "megacore"}
_DOCS = "https://docs.cloud.google.com/tpu/docs"
_GIB = 2**30

CHIPS = {
  "v4": Chip("TPU v4", 30.75 * _GIB, 1228e9, 300e9, 6.25e9, _CUBE, f"{_DOCS}/v4", _MEGACORE),
  "v5e": Chip("TPU v5 lite", 15.75 * _GIB, 819e9, 200e9, 3.125e9, _FLAT, f"{_DOCS}/v5e"),
  "v5p": Chip("TPU v5", 95.73 * _GIB, 2765e9, 600e9, 6.25e9, _CUBE, f"{_DOCS}/v5p", _MEGACORE),
  "v6e": Chip("TPU v6 lite", 31.24 * _GIB, 1640e9, 400e9, 12.5e9, _FLAT, f"{_DOCS}/v6e"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """`slices` slices of one shape, and their abstract devices (one a chip)."""

  name: str
  slices: int
  chip: Chip
  devices: tuple[jax.Device, ...]

  def host(self) -> "Topology":
    """What one process has of it: the four chips of a host, or all of a slice that is smaller."""
    if len(self.devices) <= _HOST:
      return self
    generation = self.name.partition(":")[0]
    shapes = self.chip.shapes
    return get(f"{generation}:{next(shape for shape in shapes if _chips(shape) == _HOST)}")

  def mesh(self, sizes: Mapping[str, int], *, batch_size: int = 0, parts: int = 1) -> Mesh:
    """The mesh that training makes on the real slice. Raises UserError as sharding.mesh.make_mesh does."""
    return make_mesh(sizes, batch_size=batch_size, parts=parts, devices=self.devices)


def known() -> str:
  """All names, for messages."""
  return "; ".join(f"{name}: {' '.join(chip.shapes)}" for name, chip in CHIPS.items())


def get(name: str, slices: int = 1) -> Topology:
  """The topology of a name such as v5e:16x16.

  Raises:
    UserError: an unknown name (the known ones are listed), or libtpu, the compiler, is not installed.
  """
  generation, _, shape = name.partition(":")
  chip = CHIPS.get(generation)
  if chip is None or shape not in chip.shapes:
    raise UserError(f"topology {name!r} is unknown; the names are GENERATION:SHAPE, one of {known()}")
  if slices < 1:
    raise UserError(f"--slices is {slices}; there is at least one")
  compiler()
  devices = _describe(name, chip, slices).devices
  if len(devices) != slices * _chips(shape):
    raise RuntimeError(f"libtpu describes {name} with {len(devices)} devices")
  return Topology(name, slices, chip, tuple(devices))


def _chips(shape: str) -> int:
  return math.prod(map(int, re.findall(r"\d+", shape)))


def compiler() -> str:
  """The version of libtpu, the compiler. Raises UserError where it is not installed."""
  try:
    return importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    raise UserError("planning needs libtpu, the TPU compiler, and no TPU: pip install 'jax[tpu]'") from None


# libtpu 0.0.42.1 weighs a fusion by recursion, for v6e deeper than the stack that its threads have by default.
# launch/lib.sh gives it to real slices.
STACK = "--fibers_default_thread_stack_size=4194304"


def _describe(name: str, chip: Chip, slices: int):
  # Neither ask a metadata server that only a cloud machine has, nor take the lock that guards a real chip: several
  # plans may run beside each other.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  given = os.environ.get("LIBTPU_INIT_ARGS", "")
  if STACK.partition("=")[0] not in given:
    os.environ["LIBTPU_INIT_ARGS"] = f"{given} {STACK}".strip()
  shape = name.partition(":")[2]
  options = dict(chip.options)
  if slices > 1:
    options["num_slices"] = slices
  if shape == "1x1":  # a host of one chip
    options["chips_per_host_bounds"] = (1, 1, 1)
  with _quiet():
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)


@contextlib.contextmanager
def _quiet():
  """libtpu complains on the process's own stderr that this is no TPU machine."""
  sys.stderr.flush()
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)
