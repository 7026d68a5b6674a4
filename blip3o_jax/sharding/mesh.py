"""The device mesh: axes `data` (whole copies), `fsdp` (copies cut up), `tensor` (layers cut up)."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from blip3o_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(
  sizes: Mapping[str, int] | None = None, *, batch_size: int = 0, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over all devices, its axes `Auto` (the compiler spreads the shardings).

  Args:
    sizes: devices along each axis; -1 (one axis at most) takes the rest. Default: everything on `data`.
    batch_size: global batch, 0 if unknown. It must divide over data * fsdp. Simulated CPU devices are there for speed
      alone, so on one CPU process the rest is as many of them as divide the batch.
    devices: all devices of all processes by default.

  Raises:
    UserError: the sizes do not fill the devices, or the batch does not divide.
  """
  chosen = devices is not None
  devices = list(devices if chosen else jax.devices())
  sizes = {"data": -1, "fsdp": 1, "tensor": 1} | dict(sizes or {})
  if unknown := set(sizes) - set(AXES):
    raise UserError(f"mesh.{min(unknown)} is no mesh axis; there are {', '.join(AXES)}")
  free = [axis for axis in AXES if sizes[axis] == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if fixed < 1 or len(free) > 1 or (free and len(devices) < fixed):
    raise UserError(f"mesh {_words(sizes)} does not fit {len(devices)} devices; set sizes >= 1, and -1 for one axis")
  simulated = devices[0].platform == "cpu" and jax.process_count() == 1 and not chosen
  if free:
    sizes[free[0]] = len(devices) // fixed
    while simulated and batch_size and sizes[free[0]] > 1 and batch_size % (sizes["data"] * sizes["fsdp"]):
      sizes[free[0]] -= 1
  total = math.prod(sizes.values())
  if total > len(devices) or (total < len(devices) and not simulated):
    raise UserError(f"mesh {_words(sizes)} has {total} places for {len(devices)} devices; set one axis to -1")
  rows = sizes["data"] * sizes["fsdp"]
  if batch_size % rows:
    raise UserError(f"batch_size {batch_size} does not divide over data * fsdp = {rows} devices; change either")
  if rows % jax.process_count():
    raise UserError(f"mesh {_words(sizes)}: data * fsdp = {rows} must be a multiple of {jax.process_count()} processes")
  shape = tuple(sizes[axis] for axis in AXES)
  return Mesh(_arrange(shape, devices[:total]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
  """Devices in the order that suits the wires: the slow network between slices carries `data` only."""
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if slices > 1 and shape[0] % slices == 0:
    return mesh_utils.create_hybrid_device_mesh(
      (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1)), devices
    )
  return mesh_utils.create_device_mesh(shape, devices)


def _words(sizes: Mapping[str, int]) -> str:
  return ", ".join(f"{axis}={size}" for axis, size in sizes.items())
