"""Files that users hand over on the command line: prompts, and data to look at."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from blip3o_jax.data import sources, transforms
from blip3o_jax.data.builders import turns
from blip3o_jax.errors import UserError


class PromptFile:
  """The rows of a JSON-lines file of prompts, read from it when they are asked for; empty lines are left out.

  Attributes:
    digest: sha256 of the file; where: its path.

  Raises:
    UserError: there is no such file, or it has no rows.
  """

  def __init__(self, path: str | Path):
    self.where, digest, places = Path(path), hashlib.sha256(), []
    if not self.where.is_file():
      raise UserError(f"{path}: no such file")
    at = 0
    with open(self.where, "rb") as file:
      for number, line in enumerate(file, start=1):
        digest.update(line)
        if line.strip():
          places.append((number, at, len(line)))
        at += len(line)
    if not places:
      raise UserError(f'{path} holds no prompts; write one {{"prompt": text}} a line')
    self.digest, self._places = digest.hexdigest(), np.asarray(places, np.int64)

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> dict:
    """A row with the text "prompt". Raises UserError naming the line that is none."""
    number, at, size = self._places[index].tolist()
    with open(self.where, "rb") as file:
      file.seek(at)
      line = file.read(size)
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UserError(f"{self.where}: line {number} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
      raise UserError(f'{self.where}: line {number} is not a row of {{"prompt": text}}')
    if not row["prompt"].strip():
      raise UserError(f"{self.where}: line {number} has an empty prompt; say what to draw")
    return row

  def line(self, index: int) -> int:
    """The number of a row's line in the file, from 1."""
    return int(self._places[index, 0])


def read_json(paths: Sequence[Path]) -> tuple[list, str]:
  """What some JSON files hold, and a digest of all of them. Raises UserError naming the one that cannot be read."""
  contents, digest = [], hashlib.sha256()
  for path in paths:
    try:
      content = path.read_bytes()
      contents.append(json.loads(content))
    except (OSError, ValueError) as error:
      raise UserError(f"{path} cannot be read as JSON: {error}") from None
    digest.update(content)
  return contents, digest.hexdigest()


def describe(path: str | Path, num: int = 3) -> Iterator[str]:
  """Lines on what a shard, a folder of shards, a corpus of such folders or a .jsonl holds, and its first samples.

  Raises:
    UserError: there is nothing to read, or it cannot be read.
  """
  for part in _parts(path):
    source = sources.open_source(str(part), captions=False)
    yield f"{part}: {source!r}"
    for i in range(min(num, len(source))):
      record = source[i]
      size = "no picture"
      if record.get("image"):
        picture = transforms.decode(record["image"], record["name"])
        size = f"{picture.width} x {picture.height}"
      yield f"  {record['name']}: {size}"
      # Conversations go by message, captions are one text.
      said = [text for turn in turns(record) for text in turn] if "conversations" in record else [record.get("text")]
      yield from (f"    {_one_line(text)}" for text in said if text is not None)


def _one_line(text: object) -> str:
  """What can be printed of a text, whatever it is."""
  return " ".join(str(text).split()).encode(errors="replace").decode()


def _parts(path: str | Path) -> list[str | Path]:
  """The shards' folders and the .jsonl files under a local folder, or `path` itself, whatever it is."""
  folder = Path(path)
  return sorted({tar.parent for tar in folder.rglob("*.tar")} | set(folder.rglob("*.jsonl"))) or [path]
