"""`blip3o plan`: one page that says whether a job fits a slice and what bounds its speed, from the real compiler."""

import dataclasses
import datetime
import json
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from blip3o_jax.errors import CheckFailed
from blip3o_jax.planning import cost, estimate, programs, topology
from blip3o_jax.planning.cost import Cost, OutOfMemory
from blip3o_jax.planning.topology import Topology

CAVEAT = "Compiler figures and bounds, not measured speeds."


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `make` found. `costs` holds a program each (drawing a picture has two), one after the other on the same chips.

  Attributes:
    job: train | generate | cache-features; images: the global batch.
    mesh: devices along each axis, of a program: of training on all chips, of other jobs on those of each host.
    short: bytes that are missing on a device, 0 where it fits.
    advice: if it does not fit, what takes the space and the smallest change that would make it fit.
  """

  job: str
  topology: Topology
  mesh: dict[str, int]
  images: int
  remat: str
  costs: tuple[Cost, ...]
  short: float
  advice: tuple[str, ...] = ()

  @property
  def peak(self) -> float:
    """Bytes of HBM on a device, of the program that takes most."""
    return max((c.memory.peak for c in self.costs), default=self.topology.chip.hbm + self.short)

  @property
  def seconds(self) -> float:
    """The least time of a step (of a batch of pictures): what bounds each program, summed."""
    return sum(c.bounds.seconds for c in self.costs)

  @property
  def images_per_second(self) -> float:
    """At most so many, on all chips together."""
    return self.images / self.seconds if self.seconds else 0.0

  @property
  def fits(self) -> bool:
    return self.short <= 0


def make(config: ConfigDict, name: str, *, slices: int = 1, job: str = "train", advise: bool = True) -> Plan:
  """Compile a job of a config ahead of time for a topology; with `advise`, look for what would make it fit.

  Raises:
    UserError: unknown topology, no compiler, a batch or a mesh that does not divide.
  """
  where = topology.get(name, slices)
  part, place = programs.of_a_process(config, where, job)
  mesh = programs.make_mesh(part, place, job)
  found, short, advice = [], 0.0, ()
  try:
    for program in programs.build(part, mesh, job):
      found.append(cost.compile_program(program, mesh, where.chip, part.batch_size))
    short = max(c.memory.peak for c in found) - where.chip.hbm
  except OutOfMemory as error:
    found, short = [], error.used - error.available
    advice = tuple(f"the compiler's largest: {line}" for line in error.largest)
  if short > 0 and advise:
    advice += estimate.advise(config, where, job, short)
  return Plan(job, where, dict(mesh.shape), config.batch_size, config.remat, tuple(found), max(short, 0.0), advice)


def run(config: ConfigDict, name: str, *, slices: int = 1, job: str = "train", as_json: bool = False) -> None:
  """Print the page, or JSON.

  Raises:
    CheckFailed: it does not fit.
  """
  plan = make(config, name, slices=slices, job=job)
  print(json.dumps(record(plan), indent=2) if as_json else page(plan))
  if not plan.fits:
    raise CheckFailed(f"{job} does not fit {name}: {plan.short / 2**30:.2f} GiB a chip too much")


def record(plan: Plan) -> dict[str, Any]:
  """The plan as JSON: bytes, seconds, operations."""
  chip = dataclasses.asdict(plan.topology.chip) | {"flops": plan.topology.chip.flops}
  return {
    "job": plan.job,
    "topology": plan.topology.name,
    "slices": plan.topology.slices,
    "mesh": plan.mesh,
    "remat": plan.remat or "as the preset says",
    "images": plan.images,
    "fits": plan.fits,
    "short_bytes": plan.short,
    "peak_bytes": plan.peak,
    "bound_seconds": plan.seconds,
    "bound_images_per_second": plan.images_per_second,
    "advice": list(plan.advice),
    "chip": {key: value for key, value in chip.items() if key not in ("shapes", "options")},
    "programs": [dataclasses.asdict(c) | {"bound_by": c.bounds.by, "peak_bytes": c.memory.peak} for c in plan.costs],
    "note": CAVEAT,
    "made": made(),
  }


def made() -> dict[str, str]:
  """By which compiler, and when: another one's figures differ."""
  return {"jax": jax.__version__, "libtpu": topology.compiler(), "date": datetime.date.today().isoformat()}


# ---- the page


def page(plan: Plan) -> str:
  """The plan for people."""
  chip, mesh = plan.topology.chip, ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
  chips, by = len(plan.topology.devices), made()
  hosts = chips // math.prod(plan.mesh.values())
  mesh = (mesh or "of one") + (f" on each of {hosts} hosts" if hosts > 1 else "")
  lines = [
    f"{plan.job} on {plan.topology.slices} x {plan.topology.name} ({chips} x {chip.kind}), mesh {mesh}",
    f"batch of {plan.images} images, {plan.images / chips:g} a chip; remat {plan.remat or 'as the preset says'}",
    f"chip: {_size(chip.hbm)} usable, {chip.flops / 1e12:g} Tflop/s bfloat16, HBM {_speed(chip.hbm_bandwidth)}, "
    f"ICI {_speed(chip.ici_bandwidth)} out, DCN {_speed(chip.dcn_bandwidth)}  ({chip.source})",
    f"{CAVEAT} jax {by['jax']}, libtpu {by['libtpu']}, {by['date']}",
  ]
  for c in plan.costs:
    lines += ["", *_program(c, chip)]
  if plan.costs:
    lines += ["", f"at least {_time(plan.seconds)} a batch: at most {plan.images_per_second:,.1f} images/s"]
  if not plan.fits:
    lines += ["", f"DOES NOT FIT: {_size(plan.short)} a chip too much", *(f"  {line}" for line in plan.advice)]
  return "\n".join(lines)


def _program(c: Cost, chip: topology.Chip) -> list[str]:
  m, b, total = c.memory, c.bounds, sum(c.flops.values())
  lines = [f"program {c.name} (compiled in {c.compile_seconds:.0f} s)"]
  parts = [("arguments", m.arguments), ("resident", m.resident), ("temporaries", m.temporaries)]
  parts += [("outputs", m.outputs), ("code", m.program)]
  words = ", ".join(f"{name} {_size(size)}" for name, size in parts if size >= 2**20)
  lines.append(f"  memory a chip   {_size(m.peak)} of {_size(chip.hbm)} ({m.peak / chip.hbm:.0%}): {words}")
  lines.append(f"  flops an image  {_flops(total)}")
  lines += [f"    {part:<22} {_flops(count):>10}  {count / total:4.0%}" for part, count in c.flops.items()]
  lines.append(f"  HBM traffic     {_size(c.bytes)} a chip")
  lines.append(f"  collectives     {_size(sum(x.sent for x in c.collectives))} sent a chip")
  for x in c.collectives:
    over = f"{', '.join(x.axes)} ({x.group})"
    lines.append(f"    {x.kind:<18} over {over:<20} {x.count:>5} x, {_size(x.size):>10}, sent {_size(x.sent):>10}")
  lines.append(
    f"  rooflines       compute {_time(b.compute)}, HBM {_time(b.hbm)}, ICI {_time(b.ici)}, DCN {_time(b.dcn)}"
  )
  lines.append(f"  bound           {_time(b.seconds)}, by {b.by}")
  return lines


def _size(count: float) -> str:
  for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
    if count >= unit:
      return f"{count / unit:.2f} {name}"
  return f"{count / 1024:.1f} KiB"


def _flops(count: float) -> str:
  return f"{count / 1e12:.3f} T" if count >= 1e11 else f"{count / 1e9:.3f} G"


def _speed(rate: float) -> str:
  return f"{rate / 1e9:g} GB/s"


def _time(seconds: float) -> str:
  return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
