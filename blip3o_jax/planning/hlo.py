"""What a compiled program moves, read from its HLO text: collectives over the mesh axes, and bytes to and from HBM."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(")
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({_KINDS})(-start)?\(")
# What goes to other slices is sent by the hosts' Megascale runtime, which does the rest of the collective.
_BETWEEN_SLICES = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) send\(.*_xla_megascale_transfer_type="([A-Z_]+)"')
_CALLED = re.compile(r"(condition|body|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind over the same mesh axes.

  Attributes:
    kind: all-gather | all-reduce | reduce-scatter | all-to-all | collective-permute.
    axes: mesh axes along which devices differ that take part together; group: how many they are.
    count: executions in one step.
    size: bytes of the whole arrays that are gathered, reduced or exchanged, on one device, all executions together.
    sent: bytes that a device sends, at best (rings, both directions).
  """

  kind: str
  axes: tuple[str, ...]
  group: int
  count: int
  size: float
  sent: float


def collectives(text: str, mesh: Mesh) -> list[Collective]:
  """The collectives of `compiled.as_text()`, those in loops as often as the loops turn, largest sender first."""
  found: dict[object, tuple] = {}
  turns = _turns(_computations(text))
  for name, lines in _computations(text).items():
    for number, line in enumerate(lines):
      if not turns[name]:
        continue
      if hit := _BETWEEN_SLICES.match(line):
        kind, group = hit[2].lower().replace("_", "-"), mesh.shape["slice"]
        size = _bytes(hit[1], largest=True) * (group if kind == "all-gather" else 1)
        found[name, number] = turns[name], kind, ("slice",), group, size
        continue
      if not (hit := _COLLECTIVE.match(line)):
        continue
      kind = _kind(hit[2], name)
      ids = _groups(line)
      # A collective that overlaps with other work appears in every fusion that it runs through, under one channel.
      channel = re.search(r"channel_id=(\d+)", line)
      key = channel[1] if channel else (name, number)
      size = _bytes(hit[1], largest=bool(hit[3])) * (len(ids) if kind == "reduce-scatter" and hit[2] == kind else 1)
      if key not in found or found[key][0] < turns[name]:
        found[key] = turns[name], kind, _axes(ids, mesh), len(ids), size
  return _summed(found.values())


def _summed(found: Iterable[tuple]) -> list[Collective]:
  total: dict[tuple, list] = {}
  for count, kind, axes, group, size in found:
    if group > 1:
      entry = total.setdefault((kind, axes, group), [0, 0.0])
      entry[0] += count
      entry[1] += count * size
  # Rings: every device passes on all but its own part; a sum goes round twice.
  ring = lambda kind, group: (2 if kind == "all-reduce" else 1) * (1 - 1 / group)
  part = lambda kind, group: 1.0 if kind == "collective-permute" else ring(kind, group)
  rows = [Collective(*key, count, size, size * part(key[0], key[2])) for key, (count, size) in total.items()]
  return sorted(rows, key=lambda row: -row.sent)


def _kind(opcode: str, computation: str) -> str:
  """The TPU compiler writes a reduce-scatter as an all-reduce and a slice, fused under a telling name."""
  return "reduce-scatter" if opcode == "all-reduce" and computation.startswith("all-reduce-scatter") else opcode


def _computations(text: str) -> dict[str, list[str]]:
  """{name: lines}; the entry is called "ENTRY"."""
  found: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in text.splitlines():
    if line and not line[0].isspace() and (hit := _COMPUTATION.match(line)) and line.endswith("{"):
      lines = found["ENTRY" if hit[1] else hit[2]] = []
    else:
      lines.append(line)
  return found


def _turns(computations: dict[str, list[str]]) -> dict[str, int]:
  """How often each computation runs in one step."""
  callers: dict[str, list[tuple[str, int]]] = {name: [] for name in computations}
  for name, lines in computations.items():
    for line in lines:
      called = {word: re.findall(r"[\w.\-]+", names) for word, names in _CALLED.findall(line)}
      for word, names in called.items():
        times = _trips(computations[called["condition"][0]]) if word in ("body", "condition") else 1
        for other in names:
          if other in callers:
            callers[other].append((name, times))

  @functools.cache
  def count(name: str) -> int:
    return 1 if name == "ENTRY" else sum(times * count(caller) for caller, times in callers[name])

  return {name: count(name) for name in computations}


def _trips(condition: list[str]) -> int:
  """The bound of a loop that counts from 0, as those of `lax.scan` do; 1 where the condition is something else."""
  text = "\n".join(condition)
  bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", text)
  return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in text else 1


def _bytes(types: str, largest: bool) -> int:
  """Bytes of all arrays of a result type; of an asynchronous start, which names its operands too, of the largest."""
  bits = lambda kind: int(re.sub(r"\D", "", kind) or 8)
  sizes = [
    _BYTES.get(kind, bits(kind) / 8) * math.prod(int(n) for n in shape.split(",") if n)
    for kind, shape in _ARRAY.findall(types)
  ]
  return int(max(sizes) if largest else sum(sizes))


def _groups(line: str) -> np.ndarray:
  """Positions (in the order of the mesh's devices) of the devices of the first group."""
  if hit := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
    pairs = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", hit[0])]
    return np.asarray(next((pair for pair in pairs if pair[0] != pair[1]), [0]))
  if hit := re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", line
  ):
    return _named_groups(hit[1], hit[4], _iota(hit[2], hit[3]) if hit[2] else None)
  if hit := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    return _iota(hit[2], hit[3]).reshape([int(n) for n in hit[1].split(",")])[0]
  if hit := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return np.asarray([int(n) for n in hit[1].split(",")])
  raise ValueError(f"the groups of this collective are written in an unknown way: {line.strip()[:300]}")


def _iota(sizes: str, order: str | None) -> np.ndarray:
  """Devices counted off along axes of these sizes, which are then put in that order: "4,2" and "1,0"."""
  sizes = [int(n) for n in sizes.split(",")]
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _named_groups(sizes: str, axes: str, devices: np.ndarray | None) -> np.ndarray:
  """Groups written as axes of a mesh: 'a'=2,'b'=4 and {'b'}; 'b':(2)2 is the part of b of size 2 inside 2 blocks.

  devices: those of the mesh; None: counted off.
  """
  shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
  ids = np.arange(math.prod(shape.values())) if devices is None else devices
  ids = ids.reshape(list(shape.values()))
  index: list[np.ndarray] = [np.asarray([0])] * len(shape)
  for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
    at, size = list(shape).index(name), shape[name]
    count = int(part or size)
    step = size // (int(before or 1) * count)
    index[at] = np.unique(np.concatenate([index[at] + i * step for i in range(count)]))
  return ids[np.ix_(*index)].ravel()


def _axes(ids: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
  """The mesh axes along which the devices at these positions differ."""
  places = np.unravel_index(ids, mesh.devices.shape)
  return tuple(axis for axis, where in zip(mesh.axis_names, places, strict=True) if len(set(where.tolist())) > 1)


# ---- traffic

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z\-]+)\((.*)$")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_SLICES = {"dynamic-slice", "slice", "gather"}


def hbm_bytes(text: str) -> float:
  """Bytes that a device reads from and writes to HBM in one step, by the operands and results of every operation.

  What the compiler placed in on-chip memory (space 1 of its layouts) costs nothing, a slice costs what is sliced, an
  update what is updated. What a kernel reads twice is counted once.
  """
  computations = _computations(text)
  turns = _turns(computations)
  inner = {name for lines in computations.values() for line in lines for name in _inner(line)}
  bodies = {name: [_INSTRUCTION.match(line) for line in lines] for name, lines in computations.items()}
  total = 0.0
  for name, instructions in bodies.items():
    if turns[name] and name not in inner:
      total += turns[name] * sum(_traffic(hit, _sizes(instructions), bodies) for hit in instructions if hit)
  return total


def _inner(line: str) -> list[str]:
  """Computations that run inside one operation (fused, or applied by a reduction), not as a program of their own."""
  return [name for word, names in _CALLED.findall(line) if word in ("calls", "to_apply") for name in _names(names)]


def _names(text: str) -> list[str]:
  return re.findall(r"[\w.\-]+", text)


@functools.cache
def _hbm(types: str) -> float:
  """Bytes of the arrays of a type that lie in HBM."""
  return sum(_bytes(array, largest=False) for array in _arrays(types) if "S(" not in array)


def _arrays(types: str) -> list[str]:
  """The types of a tuple's arrays, however nested."""
  return re.findall(r"[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?", types)


def _sizes(instructions) -> dict[str, float]:
  return {hit[2]: _hbm(hit[3]) for hit in instructions if hit}


def _operands(hit) -> list[str]:
  return re.findall(r"%([\w.\-]+)", hit[5].split("), ")[0])


def _traffic(hit, sizes: dict[str, float], bodies) -> float:
  opcode = hit[4]
  if opcode in _FREE or opcode.endswith("-done") or "AsyncCollective" in hit[5]:
    return 0.0
  operands, result = [sizes.get(name, 0.0) for name in _operands(hit)], sizes[hit[2]]
  if opcode.removesuffix("-start") in _SLICES:
    part = _arrays(hit[3])[len(operands) if opcode.endswith("-start") else 0]  # a start names its operands first
    return _hbm(part) + (_bytes(part, largest=False) if operands[0] else 0.0)
  if opcode == "dynamic-update-slice":
    return 2 * operands[1]
  if opcode.endswith("-start") and opcode != "all-reduce-start":  # with its operands in its result
    return result
  if opcode == "fusion":
    return _fused(operands, result, _inner(hit.string)[0], bodies)
  return sum(operands) + result


def _fused(operands: list[float], result: float, name: str, bodies) -> float:
  """A fusion that only slices an operand reads the slice; one that updates an operand in place writes the update.

  A collective that runs beside other work goes through several fusions, with its arrays among their operands and
  results: it counts where it starts.
  """
  instructions = [hit for hit in bodies[name] if hit]
  custom = " ".join(hit[5] for hit in instructions if hit[4] == "custom-call")
  running = sum(_hbm(hit[3]) for hit in instructions if hit[4] in _KINDS.split("|"))
  if "AsyncCollectiveStart" in custom:
    return sum(operands) + running
  if "AsyncCollectiveDone" in custom:
    return 0.0
  total, result = 0.0, result - running
  for number, whole in enumerate(operands):
    uses = _uses(name, number, bodies)
    kinds = {opcode for opcode, _, _ in uses}
    touched = min(whole, sum(size for _, _, size in uses))
    if kinds <= {"tuple", *_KINDS.split("|")}:  # passed on
      result -= whole if "tuple" in kinds else 0.0
    elif kinds <= _SLICES:
      total += touched
    elif kinds == {"dynamic-update-slice"} and all(place == 0 for _, place, _ in uses):
      total, result = total + touched, result - whole + touched
    else:
      total += whole
  return total + max(result, 0.0)


def _uses(name: str, number: int, bodies) -> list[tuple[str, int, float]]:
  """What a fusion does with its operand `number`, in the fusions within it and behind bitcasts as well: opcode
  ("return" where it is the result), place among the operands, and bytes of the slice or the update."""
  instructions = [hit for hit in bodies[name] if hit]
  types = {hit[2]: hit[3] for hit in instructions}
  aliases, found = set(), []
  for hit in instructions:
    opcode, operands = hit[4], _operands(hit)
    part = types[operands[1]] if opcode == "dynamic-update-slice" else hit[3]
    uses = [(opcode, place, float(_bytes(part, largest=False))) for place, x in enumerate(operands) if x in aliases]
    if opcode == "fusion":
      uses = [inside for _, place, _ in uses for inside in _uses(_inner(hit.string)[0], place, bodies)]
    itself = opcode == "parameter" and int(hit[5].split(")")[0]) == number
    if itself or {"bitcast", "return"} & {use[0] for use in uses}:
      aliases.add(hit[2])
      uses += [("return", 0, 0.0)] if hit[1] else []
    found += [use for use in uses if use[0] != "bitcast" and (use[0] != "return" or hit[1])]
  return found
