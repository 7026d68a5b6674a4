"""The device mesh: `slice` and `data` (whole copies of the model), `fsdp` (copies cut up), `tensor` (layers cut up)."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from blip3o_jax.errors import UserError

# Outermost first. `slice` has an axis of its own, so that one sees what crosses the slow network between slices of a
# pod: the batch is cut over it, no parameter ever is, so it carries the sum of the gradients and nothing else.
AXES = ("slice", "data", "fsdp", "tensor")


def make_mesh(
  sizes: Mapping[str, int] | None = None,
  *,
  batch_size: int = 0,
  parts: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh over all devices, its axes `Auto` (the compiler spreads the shardings).

  Args:
    sizes: devices along each axis; -1 (one axis at most) takes the rest, 0 for `slice` is as many slices as the devices
      say they are of. Default: everything on `data`.
    batch_size: global batch, 0 if unknown. Each of its `parts` (accumulated one after the other) must divide over
      slice * data * fsdp. Simulated devices cost nothing, so in one CPU process some may be left over, and the
      rest is as many as divide the batch.
    devices: all devices of all processes by default; those of a described topology do as well.

  Raises:
    UserError: the sizes do not fill the devices, the batch does not divide (naming the nearest that do), or see reader.
  """
  chosen = devices is not None
  devices = list(devices if chosen else jax.devices())
  slices = len({_slice_of(d) for d in devices})
  sizes = {"slice": 0, "data": -1, "fsdp": 1, "tensor": 1} | dict(sizes or {})
  if unknown := set(sizes) - set(AXES):
    raise UserError(f"mesh.{min(unknown)} is no mesh axis; there are {', '.join(AXES)}")
  sizes["slice"] = sizes["slice"] or slices
  if slices > 1 and sizes["slice"] != slices:
    raise UserError(f"mesh.slice is {sizes['slice']} for devices of {slices} slices; set it to {slices}, or 0")
  free = [axis for axis in AXES if sizes[axis] == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if min(sizes.values()) < -1 or fixed < 1 or len(free) > 1 or (free and len(devices) < fixed):
    raise UserError(f"mesh {_words(sizes)} does not fit {len(devices)} devices; set sizes >= 1, and -1 for one axis")
  hosts = len({d.process_index for d in devices})
  simulated = devices[0].platform == "cpu" and hosts == 1 and not chosen
  rows = lambda: sizes["slice"] * sizes["data"] * sizes["fsdp"] * parts
  if free:
    sizes[free[0]] = len(devices) // fixed
    while simulated and batch_size and sizes[free[0]] > 1 and batch_size % rows():
      sizes[free[0]] -= 1
  total = math.prod(sizes.values())
  if total > len(devices) or (total < len(devices) and not simulated):
    raise UserError(f"mesh {_words(sizes)} has {total} places for {len(devices)} devices; set one axis to -1")
  if batch_size % rows():
    times = f" times {parts} accumulated parts" if parts > 1 else ""
    raise UserError(
      f"batch_size {batch_size} does not divide over {rows()}, slice * data * fsdp of mesh {_words(sizes)}{times}; "
      f"the nearest that do are {_nearest(batch_size, rows())}"
    )
  shape = tuple(sizes[axis] for axis in AXES)
  mesh = Mesh(_arrange(shape, devices[:total], slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))
  reader(mesh, devices[0].process_index)
  return mesh


def reader(mesh: Mesh, process: int) -> tuple[int, int]:
  """(i, n): `process` reads the i-th of n equal parts of every batch. Processes that hold the same rows, as where
  `tensor` cuts layers over several hosts, read the same part.

  Raises:
    UserError: the devices of two processes share some rows and not all.
  """
  held: dict[int, set[int]] = {}
  cells = mesh.devices.reshape(-1, mesh.shape["tensor"])
  for row, cell in enumerate(cells):
    for device in cell:
      held.setdefault(device.process_index, set()).add(row)
  parts = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, parts)) != len(cells) or len(set(map(len, parts))) > 1:
    raise UserError(
      f"mesh {_words(mesh.shape)}: slice * data * fsdp is {len(cells)}, which the {len(held)} processes cannot share "
      "out, each with whole rows of a batch for its devices; take another tensor"
    )
  return parts.index(tuple(sorted(held[process]))), len(parts)


def _arrange(shape: tuple[int, ...], devices: list[jax.Device], slices: int) -> np.ndarray:
  """Devices in the order that suits the wires."""
  if slices > 1:
    inside, between = (1, *shape[1:]), (slices, *[1] * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _slice_of(device: jax.Device) -> int:
  return getattr(device, "slice_index", 0) or 0


def _nearest(size: int, unit: int) -> str:
  below = size // unit * unit
  return f"{below} and {below + unit}" if below else f"{unit} and {2 * unit}"


def _words(sizes: Mapping[str, int]) -> str:
  return ", ".join(f"{axis}={size}" for axis, size in sizes.items())
