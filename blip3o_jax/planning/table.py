"""`blip3o plan --table DIR`: the jobs of the paper on every chip at 8, 64 and 256 chips, a compile a cell.

A cell is kept as DIR/CELL.json as soon as it is known, so the command can be stopped and called again; one of another
config or compiler is made anew. DIR/table.md and DIR/scaling.svg show what is there. Weak scaling: every cell has the
same number of images a chip.
"""

import dataclasses
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from blip3o_jax.data.outputs import write_atomically
from blip3o_jax.errors import UserError
from blip3o_jax.planning import plan, programs, topology
from blip3o_jax.training.config import load_config

CHIPS = (8, 64, 256)
SHAPES = {
  "v4": ("2x2x2", "4x4x4", "4x8x8"),
  "v5e": ("2x4", "8x8", "16x16"),
  "v5p": ("2x2x2", "4x4x4", "4x8x8"),
  "v6e": ("2x4", "8x8", "16x16"),
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table: a job of a config, `images` at once on each chip."""

  name: str
  title: str
  config: str
  job: str
  images: int


ROWS = (
  Row("pretrain-8b", "pretraining 8B", "pretrain_8b.py", "train", 8),
  Row("pretrain-4b", "pretraining 4B", "pretrain_4b.py", "train", 8),
  Row("instruct-8b", "instruction tuning 8B", "instruct_8b.py", "train", 8),
  Row("features-8b", "feature caching", "pretrain_8b.py", "cache-features", 16),
  Row("sampling-8b", "1024-pixel pictures, 8B", "pretrain_8b.py", "generate", 1),
)


def run(directory: Path, configs: Path, only: Sequence[str] = ()) -> None:
  """Compute the cells that DIR lacks, the most wanted first, and write the table of those it has.

  Args:
    configs: the folder of the experiments; only: names of cells (row:generation:chips) or rows; all of them if empty.

  Raises:
    UserError: a name that is no cell, no compiler, a config that is not there.
  """
  wanted = [cell for cell in cells() if not only or {cell, cell.split(":")[0]} & set(only)]
  if unknown := set(only) - {cell.split(":")[0] for cell in cells()} - set(cells()):
    raise UserError(f"{min(unknown)} is no cell; cells are ROW:CHIP:COUNT, such as {cells()[0]}")
  by = plan.made()
  known = read(directory)
  for cell in wanted:
    config = cell_config(cell, configs)
    row, generation, chips = _parts(cell)
    name = f"{generation}:{SHAPES[generation][CHIPS.index(chips)]}"
    part, place = programs.of_a_process(config, topology.get(name), row.job)
    made_of = {"counting": _COUNTING, "config": _stamp(part), "job": row.job, "topology": place.name}
    program = {"jax": by["jax"], "libtpu": by["libtpu"], **made_of}
    same = {key: record for key, record in known.items() if program.items() <= record["made"].items()}
    if cell in same:
      continue
    print(f"{cell} ...", flush=True)
    if same:  # rows that differ in their data alone, or in the number of hosts that do the same
      twin = next(iter(same.values()))
      rate = config.batch_size / twin["bound_seconds"] if twin["fits"] else 0.0
      content = twin | {"topology": name, "images": config.batch_size, "bound_images_per_second": rate}
    else:
      content = plan.record(plan.make(config, name, job=row.job, advise=False))
      content["made"] = program | {"date": by["date"]}
    known[cell] = content | {"cell": cell}
    path = directory / f"{cell.replace(':', '-')}.json"
    write_atomically(path, (json.dumps(known[cell], indent=1) + "\n").encode())
    print(f"{cell}  {_words(content)}", flush=True)
  known = read(directory)  # another process may have made some as well
  write_atomically(directory / "table.md", markdown(known).encode())
  write_atomically(directory / "scaling.svg", scaling_svg(known).encode())
  print(markdown(known))


def cells() -> list[str]:
  """Names of all cells, the most wanted first."""
  return [
    f"{row.name}:{chip}:{count}" for row in ROWS for count in (64, 256, 8) for chip in ("v5e", "v5p", "v6e", "v4")
  ]


def read(directory: Path) -> dict[str, dict[str, Any]]:
  """The records of a folder's cells by name."""
  records = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
  return {record["cell"]: record for record in records if "cell" in record}


def _parts(cell: str) -> tuple[Row, str, int]:
  name, generation, chips = cell.split(":")
  return next(row for row in ROWS if row.name == name), generation, int(chips)


_COUNTING = 3  # of our programs, and of what planning.hlo reads in them: one more makes every cell old
# What a program depends on: another value makes a cell old.
_COMPILED = ("objective", "objective_args", "model", "components", "trainable", "data", "optimizer", "ema_decay")
_COMPILED += ("compute_dtype", "mesh", "remat", "batch_size", "accumulate", "sampling")
_SHAPES = ("task", "image_size", "max_length", "max_patches")  # of data


def _stamp(config) -> str:
  fields = {key: config.to_dict()[key] for key in _COMPILED}
  fields["data"] = {key: fields["data"].get(key) for key in _SHAPES}
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def cell_config(cell: str, configs: Path) -> ConfigDict:
  """The experiment of a cell, with its batch, and the encoder's weights whole on every chip, where they fit."""
  row, _, chips = _parts(cell)
  words = [f"batch_size={row.images * chips}", "accumulate=1"]
  words += ["mesh.data=-1", "mesh.fsdp=1"] * (row.job == "cache-features")
  return load_config(configs / row.config, [f"--config.{word}" for word in words])


# ---- what it shows


def markdown(known: Mapping[str, Mapping[str, Any]]) -> str:
  """The table of the cells that are known: memory of a chip, bound on images a second, and what bounds it."""
  lines = ["| job, images a chip | chip | " + " | ".join(f"{n} chips" for n in CHIPS) + " |", "|---|---|---|---|---|"]
  for row in ROWS:
    for generation in SHAPES:
      found = [known.get(f"{row.name}:{generation}:{n}") for n in CHIPS]
      if any(found):
        words = " | ".join(_words(record) if record else "" for record in found)
        lines.append(f"| {row.title}, {row.images} | {generation} | {words} |")
  makers = sorted({f"libtpu {r['made']['libtpu']} with jax {r['made']['jax']}" for r in known.values()})
  days = sorted({r["made"]["date"] for r in known.values()})
  made = f"Made by {', '.join(makers)}, {' to '.join([*days[:1], *days[1:][-1:]])}. " if known else ""
  return "\n".join([*lines, "", f"{made}{plan.CAVEAT} No fit is told by what is missing on each chip."]) + "\n"


def _words(record: Mapping[str, Any]) -> str:
  if not record["fits"]:
    return f"no fit, {record['short_bytes'] / 2**30:.1f} GiB short"
  bound = max(record["programs"], key=lambda p: max(p["bounds"].values()))["bound_by"]
  rate = record["bound_images_per_second"]
  return f"{record['peak_bytes'] / 2**30:.1f} GiB, {rate:,.{1 if rate < 10 else 0}f}/s ({bound})"


WIDTH, HEIGHT, LEFT, BOTTOM = 480, 300, 60, 60
_DASHES = dict(zip(SHAPES, ("2 5", "none", "9 4", "9 3 2 3"), strict=True))  # lines of two chips may lie on each other


def scaling_svg(known: Mapping[str, Mapping[str, Any]]) -> str:
  """Bytes that a chip sends in one step over the number of chips, a line for each training program and chip."""
  lines = {}
  for generation in SHAPES:
    for row in ROWS:
      found = [(n, known.get(f"{row.name}:{generation}:{n}", {}).get("programs", ())) for n in CHIPS]
      points = [(n, sum(c["sent"] for p in programs for c in p["collectives"])) for n, programs in found]
      if row.job == "train" and (points := tuple((n, sent) for n, sent in points if sent)):
        lines.setdefault((generation, points), []).append(row.title)  # rows of one program share a line
  top = max((sent for _, points in lines for _, sent in points), default=1.0) * 1.1
  x = lambda n: LEFT + (CHIPS.index(n) + 0.5) * (WIDTH - LEFT) / len(CHIPS)
  y = lambda sent: 24 + (HEIGHT - BOTTOM - 24) * (1 - sent / top)
  size = f"0 0 {WIDTH} {HEIGHT + 16 * len(lines)}"
  parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif" font-size="11">']
  parts.append('<rect width="100%" height="100%" fill="white"/>')
  text = lambda at, down, words, anchor="middle": parts.append(
    f'<text x="{at:.0f}" y="{down:.0f}" text-anchor="{anchor}">{html.escape(words)}</text>'
  )
  text(LEFT, 14, "sent by a chip in one step, with the same number of images a chip", "start")
  for n in CHIPS:
    text(x(n), HEIGHT - BOTTOM + 20, f"{n} chips")
  for i in range(5):
    text(LEFT - 6, y(top * i / 4) + 4, f"{top * i / 4 / 1e9:.0f} GB", "end")
    parts.append(f'<path d="M{LEFT} {y(top * i / 4):.1f}H{WIDTH}" stroke="#ccc"/>')
  for i, ((generation, points), titles) in enumerate(lines.items()):
    look = f'fill="none" stroke="hsl({360 * i / len(lines):.0f} 60% 40%)" stroke-dasharray="{_DASHES[generation]}"'
    path = " ".join(f"{x(n):.1f},{y(sent):.1f}" for n, sent in points)
    parts.append(f'<polyline points="{path}" stroke-width="2" {look}/>')
    parts += [f'<circle cx="{x(n):.1f}" cy="{y(sent):.1f}" r="3" {look}/>' for n, sent in points]
    parts.append(f'<path d="M{LEFT} {HEIGHT + 16 * i - 16}h34" stroke-width="2" {look}/>')
    text(LEFT + 42, HEIGHT + 16 * i - 12, f"{generation}, {' and '.join(titles)}", "start")
  return "\n".join([*parts, "</svg>"]) + "\n"
