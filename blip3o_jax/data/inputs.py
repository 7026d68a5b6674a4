"""Files that users hand over on the command line: prompts, and data to look at."""

import json
from collections.abc import Iterator
from pathlib import Path

from blip3o_jax.data import sources, transforms
from blip3o_jax.errors import UserError


def read_prompts(path: str | Path) -> list[str]:
  """The prompts of a JSON-lines file of {"prompt": text}; empty lines are left out.

  Raises:
    UserError: naming the line that is not such a row, or a file without any.
  """
  prompts = []
  for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      raise UserError(f"{path}: line {number} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
      raise UserError(f'{path}: line {number} is not a row of {{"prompt": text}}')
    prompts.append(row["prompt"])
  if not prompts:
    raise UserError(f'{path} holds no prompts; write one {{"prompt": text}} a line')
  return prompts


def describe(path: str | Path, num: int = 3) -> Iterator[str]:
  """Lines on what a shard, a folder of shards, a corpus of such folders or a .jsonl holds, and its first samples.

  Raises:
    UserError: there is nothing to read, or it cannot be read.
  """
  for part in _parts(path):
    source = sources.open_source(str(part))
    yield f"{part}: {source!r}"
    for i in range(min(num, len(source))):
      record = source[i]
      size = "no picture"
      if record.get("image"):
        picture = transforms.decode(record["image"], record["name"])
        size = f"{picture.width} x {picture.height}"
      # Conversations go by message, captions are one text.
      turns = record.get("conversations") or [{"value": record.get("text", "")}]
      yield f"  {record['name']}: {size}"
      yield from (f"    {' '.join(str(text).split())}" for text in (turn["value"] for turn in turns))


def _parts(path: str | Path) -> list[str | Path]:
  """The shards' folders and the .jsonl files under a local folder, or `path` itself, whatever it is."""
  folder = Path(path)
  return sorted({tar.parent for tar in folder.rglob("*.tar")} | set(folder.rglob("*.jsonl"))) or [path]
