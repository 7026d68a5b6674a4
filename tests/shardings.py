"""Where every parameter lies on a mesh, and what one step sends over the wires, as text to compare.

  python tests/shardings.py            compares with tests/golden/shardings, exit status 1 if anything differs
  python tests/shardings.py --write    writes them anew: read the difference before you commit it

Eight simulated devices, data 2 x fsdp 2 x tensor 2; nothing of the 8B is ever allocated.
"""

import difflib
import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from blip3o_jax.sharding.mesh import make_mesh
from blip3o_jax.training import trainer
from blip3o_jax.training.config import load_config

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden/shardings"
CONFIGS = {"micro": "configs/micro/generation.py", "blip3o-8b": "configs/pretrain_8b.py"}
MESH = {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
WIDTH = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s8": 1, "u8": 1, "s64": 8, "u64": 8}


def parameters(program) -> list[str]:
  """One line a parameter: path, dtype, shape, how each dimension is cut; first, the bytes on a device."""
  per_device = lambda tree: sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  parts = {"frozen": program.frozen, "trained": program.state.trained, "optimizer": program.state.opt_state}
  lines = [f"# {name}: {per_device(tree):,} bytes on each device" for name, tree in parts.items()]
  trained = flatten_dict(program.state.trained)
  for path, x in sorted(flatten_dict(program.params).items()):
    spec = [*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))]
    cut = ", ".join("-" if axes is None else axes if isinstance(axes, str) else "+".join(axes) for axes in spec)
    kind = "trained" if path in trained else "frozen"
    lines.append(f"{'/'.join(path):<66} {kind:<7} {x.dtype.name:<8} {str(list(x.shape)):<24} ({cut})")
  return lines


def axes_of(groups: str) -> str:
  """The mesh axes along which a collective goes, from its replica groups, which a program writes in three ways:

  {{0,1},{2,3}}     [2,4]<=[4,2]T(1,0)     mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}
  """
  numbers = lambda text: [int(n) for n in text.split(",")]

  def ids(dims, order):
    grid = np.arange(np.prod(numbers(dims))).reshape(numbers(dims))
    return grid.transpose(numbers(order)) if order else grid

  if groups.startswith("mesh"):
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", groups)}
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", groups)
    grid = (ids(*order.groups()) if order else np.arange(8)).reshape(tuple(sizes.values()))
    along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", groups.rsplit("{", 1)[1])]
    rest = [i for i in range(grid.ndim) if i not in along]
    found = grid.transpose(*rest, *along).reshape(-1, np.prod([grid.shape[i] for i in along]))
  elif iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups):
    found = ids(iota[2], iota[3]).reshape(numbers(iota[1]))
  else:
    found = np.asarray([numbers(group) for group in re.findall(r"\{([\d,]+)\}", groups)])
  found = {frozenset(row.tolist()) for row in np.atleast_2d(found)}
  devices, names = np.arange(8).reshape(tuple(MESH.values())), list(MESH)
  for count in range(1, 5):
    for chosen in itertools.combinations(range(4), count):
      rest = [i for i in range(4) if i not in chosen]
      rows = devices.transpose(*rest, *chosen).reshape(-1, int(np.prod([devices.shape[i] for i in chosen]))).tolist()
      if all(devices.shape[i] > 1 for i in chosen) and {frozenset(row) for row in rows} == found:
        return "+".join(names[i] for i in chosen)
  return "other"


def collectives(hlo: str) -> list[str]:
  """One line for each array that a collective of a compiled program makes: how often it is written, and its size.

  One inside a loop over layers is written once and runs for every layer.
  """
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  seen = Counter()
  for line in hlo.splitlines():
    if not (match := re.search(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", line)):
      continue
    groups = re.search(r"replica_groups=(mesh[^{]*\{[^}]*\}|\{\{.*?\}\}|\[\S+?\]<=\S+?)(?:, |$)", line)
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):  # several in one are the compiler's packing
      size = WIDTH[dtype] * int(np.prod([int(n) for n in dims.split(",") if n]))
      seen[match[2], axes_of(groups[1]) if groups else "pairs", size, f"{dtype}[{dims}]"] += 1
  line = "{:>3} x {:<18} {:<18} {:>9,} B  {}".format
  return [line(n, *key) for key, n in sorted(seen.items())]


def step_of_micro(program) -> str:
  """The compiled step of the miniature's generation stage, batch 16, 32 tokens."""
  kinds = {
    "tokens": ((16, 32), "int32"),
    "token_mask": ((16, 32), "bool"),
    "positions": ((16, 3, 32), "int32"),
    "pixels": ((16, 64, 64, 3), "uint8"),
  }
  batch = {name: jax.ShapeDtypeStruct(*kind) for name, kind in kinds.items()}
  with jax.set_mesh(program.mesh):
    lowered = program.step.lower(program.state, program.frozen, batch)
    return lowered.compile({"xla_backend_optimization_level": 0}).as_text()  # the partitioner has done its work by then


def texts() -> dict[str, str]:
  """{file name: text} of all that is held."""
  mesh = make_mesh(MESH)
  adamw = ["optimizer.name=adamw"]  # as the big recipes; Muon's own products would fill the list of collectives
  programs = {name: trainer.build(load_config(ROOT / file, adamw), mesh) for name, file in CONFIGS.items()}
  lines = {f"{name}.txt": parameters(program) for name, program in programs.items()}
  lines["micro_collectives.txt"] = collectives(step_of_micro(programs["micro"]))
  head = f"# mesh {', '.join(f'{axis} {size}' for axis, size in MESH.items())}; python tests/shardings.py --write"
  return {name: "\n".join([head, *text]) + "\n" for name, text in lines.items()}


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  different = False
  for name, text in texts().items():
    path = GOLDEN / name
    if sys.argv[1:] == ["--write"]:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
      continue
    before = path.read_text() if path.exists() else ""
    difference = list(difflib.unified_diff(before.splitlines(), text.splitlines(), str(path), "now", lineterm="", n=0))
    print("\n".join(difference))
    different |= bool(difference)
  if different:
    sys.exit("shardings or collectives changed; if that is meant: python tests/shardings.py --write")
