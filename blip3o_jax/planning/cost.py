"""What a compiled program costs on a chip: memory, and the least time that arithmetic, memory and wires allow."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from blip3o_jax.planning import hlo
from blip3o_jax.planning.hlo import Collective
from blip3o_jax.planning.programs import Program
from blip3o_jax.planning.topology import Chip


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of HBM on one device.

  Attributes:
    arguments: weights, optimizer, batch; resident: weights that lie there for another program of the job.
    temporaries: the compiler's peak of everything in between; outputs: what does not take the place of an argument.
    program: the code itself.
  """

  arguments: float
  resident: float
  temporaries: float
  outputs: float
  program: float

  @property
  def peak(self) -> float:
    return self.arguments + self.resident + self.temporaries + self.outputs + self.program


@dataclasses.dataclass(frozen=True)
class Bounds:
  """Seconds that one execution takes at least, each as if all else were free: no program is faster than the largest.

  compute: operations at the chip's bfloat16 peak; hbm: bytes to and from memory; ici: bytes sent to other chips of the
  slice; dcn: bytes sent to other slices.
  """

  compute: float
  hbm: float
  ici: float
  dcn: float

  @property
  def seconds(self) -> float:
    return max(self.compute, self.hbm, self.ici, self.dcn)

  @property
  def total(self) -> float:
    """One after the other, as if nothing ran beside anything else."""
    return self.compute + self.hbm + self.ici + self.dcn

  @property
  def by(self) -> str:
    """Which of them is the largest."""
    return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


@dataclasses.dataclass(frozen=True)
class Cost:
  """One program, compiled. `flops` are operations an image, by part; `bytes` those to and from HBM on one device."""

  name: str
  memory: Memory
  flops: dict[str, float]
  bytes: float
  collectives: tuple[Collective, ...]
  bounds: Bounds
  compile_seconds: float


class OutOfMemory(Exception):
  """The compiler found no way to fit a program: `used` of `available` bytes of HBM on one device."""

  def __init__(self, used: float, available: float, largest: Sequence[str]):
    super().__init__(f"{used:.0f} of {available:.0f} bytes")
    self.used, self.available, self.largest = used, available, tuple(largest)


def compile_program(program: Program, mesh: Mesh, chip: Chip, images: int) -> Cost:
  """Compile for the mesh's devices and read what the compiler says; `images` go through one execution.

  Raises:
    OutOfMemory: it does not fit the chip.
  """
  start = time.monotonic()
  lowered = program.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    raise _out_of_memory(error) from error
  seconds = time.monotonic() - start
  resident = max(0.0, device_bytes(program.arguments) - device_bytes(program.arguments, compiled))
  memory, text = memory_of(compiled, resident), compiled.as_text()
  moved = hlo.hbm_bytes(text)
  wires = tuple(hlo.collectives(text, mesh))
  executed = sum(program.flops.values()) * images / mesh.size
  return Cost(program.name, memory, program.flops, moved, wires, bounds(chip, executed, moved, wires), seconds)


def memory_of(compiled: jax.stages.Compiled, resident: float = 0.0) -> Memory:
  """What the compiler says that a program needs on one device, beside what is `resident` for others."""
  stats = compiled.memory_analysis()
  return Memory(
    arguments=stats.argument_size_in_bytes,
    resident=resident,
    temporaries=stats.temp_size_in_bytes,
    outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    program=stats.generated_code_size_in_bytes,
  )


def bounds(chip: Chip, flops: float, moved: float, wires: Sequence[Collective]) -> Bounds:
  """The rooflines of one device: operations, bytes of HBM, and collectives of one execution."""
  between = [c for c in wires if "slice" in c.axes]
  return Bounds(
    compute=flops / chip.flops,
    hbm=moved / chip.hbm_bandwidth,
    ici=sum(c.sent for c in wires if c not in between) / chip.ici_bandwidth,
    dcn=sum(c.sent for c in between) / chip.dcn_bandwidth,
  )


def device_bytes(tree: Any, compiled: Any = None) -> float:
  """Bytes of a tree of sharded ShapeDtypeStruct on one device; with `compiled`, of those arguments that it takes."""
  leaves = jax.tree.leaves(tree)
  if compiled is not None:
    kept = jax.tree.leaves(compiled.input_shardings[0], is_leaf=lambda x: x is None)
    leaves = [x for x, sharding in zip(leaves, kept, strict=True) if sharding is not None]
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def _out_of_memory(error: Exception) -> Exception:
  """The compiler's own words as numbers; another error stays as it is."""
  text = str(error)
  unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  size = r"([\d.]+)([KMGT]?)"
  used = re.search(rf"\({size}\) exceeds available HBM \({size}\)", text) or re.search(
    rf"Used {size} of {size} hbm", text
  )
  if "RESOURCE_EXHAUSTED" not in text or not used:
    return error
  number = lambda value, letter: float(value) * unit[letter]
  largest = re.findall(rf"Size: {size}\n.*?(?:Operator|XLA label): ?([^\n]*)", text)
  return OutOfMemory(
    number(*used.groups()[:2]), number(*used.groups()[2:]), [f"{n}{u}iB {what[:100]}" for n, u, what in largest[:3]]
  )
