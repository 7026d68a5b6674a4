"""Pictures for prompts by the million: sharded over hosts and devices, resumable, each picture exactly once.

Every process draws its own parts on its own devices. A picture is written whole or not at all, under a name that says
which one it is, so that whoever comes next knows what is there. While one batch is drawn, the one before is written.
Several hosts write to a disk that they share.
"""

import collections
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from blip3o_jax.data.inputs import PromptFile
from blip3o_jax.data.outputs import encode_png, remove_stale, writable_folder, write_atomically
from blip3o_jax.errors import UserError
from blip3o_jax.inference.image import Sampling
from blip3o_jax.inference.model import Model, load_here
from blip3o_jax.inference.prompts import Row, edit_request
from blip3o_jax.jobs.parts import Parts, Progress, closing


class Prompts(Protocol):
  """What to draw and where it goes: the rows of a file (`Rows`), or a benchmark's (evaluation.geneval and so on).

  Attributes:
    digest: of all prompts; a job goes on only with the same. nums: of pictures a prompt that will do; None: any.
  """

  digest: str
  nums: tuple[int, ...] | None

  def __len__(self) -> int: ...

  def request(self, index: int) -> dict:
    """{"prompt": text}, perhaps with a "seed" and an "image" to edit. Raises UserError for a bad row."""

  def files(self, index: int, num: int) -> list[str]:
    """Where the pictures of a row go, relative to the output folder."""

  def finish(self, index: int, out: Path, files: Sequence[str]) -> None:
    """Write what belongs to a row beside its pictures, once they are all there."""


class Rows(PromptFile):
  """A JSON-lines file of {"prompt": TEXT}, perhaps with "seed": NUMBER, and with "image": FILE to edit by the prompt.

  Pictures go to pictures/PART/ROW-NUMBER.png, a thousand rows a folder.
  """

  nums = None

  def request(self, index: int) -> dict:
    """See Prompts."""
    row, where = self[index], f"{self.where}: line {self.line(index)}"
    if (seed := row.get("seed", 0)) is not None and not (type(seed) is int and 0 <= seed < 2**32):
      raise UserError(f"{where}: seed {seed!r} is no number from 0 to 2^32 - 1")
    if (image := row.pop("image", None)) is not None:
      if not isinstance(image, str):
        raise UserError(f'{where}: "image" is no path')
      row["image"] = str(self.where.parent / image)
    return row

  def files(self, index: int, num: int) -> list[str]:
    """See Prompts."""
    return [f"pictures/{index // 1000:05d}/{index:08d}-{n}.png" for n in range(num)]

  def finish(self, index: int, out: Path, files: Sequence[str]) -> None:
    """Nothing more."""


def picture_facts(prompt: str, seed: int, number: int, sampling: Sampling, model: str) -> dict[str, str]:
  """What a picture's file says of it: the texts of its PNG chunks."""
  settings = json.dumps(dataclasses.asdict(sampling))
  return {"prompt": prompt, "seed": str(seed), "number": str(number), "settings": settings, "model": model}


def draw_few(
  model_name: str | Path,
  prompts: Sequence[str],
  out: str | Path,
  *,
  num: int = 4,
  seed: int = 0,
  batch_size: int | None = None,
  settings: Mapping[str, Any] | None = None,
  fsdp: int = 1,
  compile_cache: str | Path | None = None,
) -> Iterator[tuple[Path, str]]:
  """Draw all pictures, to OUT/PROMPT-NUMBER.png; yields (file, prompt). Arguments as of `run`."""
  out, model = writable_folder(out), load_here(model_name, fsdp=fsdp, compile_cache=compile_cache)
  model.batch_size = batch_size or model.batch_size
  sampling = model.sampling_with(**(settings or {}))
  drawn = model.generate(prompts, num=num, seed=seed, **dataclasses.asdict(sampling))
  for i, (prompt, pictures) in enumerate(zip(prompts, drawn, strict=True)):
    for n, picture in enumerate(pictures):
      path = out / f"{i:03d}-{n}.png"
      # Not its digest, for which weights in the release's layout would all be read again.
      write_atomically(path, encode_png(picture, picture_facts(prompt, seed, n, sampling, model.name)))
      yield path, prompt


def run(
  model_name: str | Path,
  prompts: Prompts,
  out: str | Path,
  *,
  num: int = 4,
  seed: int = 0,
  batch_size: int | None = None,
  fsdp: int = 1,
  compile_cache: str | Path | None = None,
  settings: Mapping[str, Any] | None = None,
) -> str:
  """Draw `num` pictures of every prompt that has none yet; returns a line that says where.

  Args:
    model_name: whatever `inference.model.load` takes. fsdp: devices over which its weights are cut.
    seed: of prompts that bring none. batch_size: pictures at once on this process's devices.
    settings: fields of image.Sampling.

  Raises:
    UserError: `out` cannot be written or holds another job; at the end, if some rows could not be drawn.
  """
  if prompts.nums and num not in prompts.nums:
    raise UserError(f"{num} pictures a prompt; the scorer takes {' or '.join(map(str, prompts.nums))}")
  out = writable_folder(out)
  model = load_here(model_name, fsdp=fsdp, compile_cache=compile_cache)
  sampling = model.sampling_with(**(settings or {}))
  facts = {"prompts": prompts.digest, "model": model.digest, "num": num, "seed": seed}
  parts = Parts(out, len(prompts), {**facts, "settings": dataclasses.asdict(sampling)})
  _Job(model, prompts, parts, sampling, num, seed).run(model.rounded(batch_size or model.batch_size))
  return closing(parts, "rows")


@dataclasses.dataclass
class _Part:
  """A part being drawn: records by row, and how many of its pictures are still to come."""

  inputs: range
  files: dict[int, list[str]] = dataclasses.field(default_factory=dict)
  records: list[dict] = dataclasses.field(default_factory=list)
  left: int = 0


@dataclasses.dataclass
class _Item:
  """One picture to draw."""

  part: _Part
  row: Row
  seed: int
  number: int
  path: Path
  facts: dict[str, str]


class _Job:
  def __init__(self, model: Model, prompts: Prompts, parts: Parts, sampling: Sampling, num: int, seed: int):
    self.model, self.prompts, self.parts = model, prompts, parts
    self.sampling, self.num, self.seed = sampling, num, seed
    self.digest, self.todo = model.digest, parts.unfinished()
    self.progress = Progress(sum(map(len, self.todo)) * num, "pictures")

  def run(self, batch_size: int) -> None:
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1)), "png") as pool:
      drawing, writing = collections.deque(), collections.deque()
      for items in itertools.chain(self._batches(batch_size), [None]):  # nothing: no more to draw
        if items:
          drawing.append((items, self._draw(items, batch_size)))
        if drawing and (len(drawing) > 1 or not items):
          done, pixels = drawing.popleft()
          pictures = np.asarray(pixels)
          writing.append((done, [pool.submit(_write, *pair) for pair in zip(done, pictures, strict=False)]))
        if writing and (len(writing) > 1 or not items):
          self._settle(*writing.popleft())
      while writing:
        self._settle(*writing.popleft())

  def _batches(self, size: int) -> Iterator[list[_Item]]:
    items = itertools.chain.from_iterable(map(self._begin, self.todo))
    while batch := list(itertools.islice(items, size)):
      yield batch

  def _begin(self, inputs: range) -> list[_Item]:
    """What is missing of a part. Rows that cannot be drawn are told, and become records of the manifest."""
    part, items = _Part(inputs), []
    for index in inputs:
      try:
        items += self._row(part, index)
      except UserError as error:
        print(f"blip3o: {error}", file=sys.stderr, flush=True)
        part.records.append({"row": index, "error": str(error)})
        self.progress.add(self.num)
    remove_stale(item.path for item in items)
    part.left = len(items)
    if not items:
      self._finish(part)
    return items

  def _row(self, part: _Part, index: int) -> list[_Item]:
    asked = self.prompts.request(index)
    prompt, seed = asked["prompt"], asked.get("seed")
    seed = self.seed if seed is None else seed
    files = self.prompts.files(index, self.num)
    missing = [(n, path) for n, file in enumerate(files) if not (path := self.parts.out / file).exists()]
    facts = lambda n: picture_facts(prompt, seed, n, self.sampling, self.digest)
    if missing:
      request = edit_request(asked["image"], prompt) if "image" in asked else prompt
      try:
        row = self.model.row_to_draw(request, self.sampling)
      except UserError as error:
        raise UserError(f"row {index}: {error}") from None
    part.files[index] = files
    for n, file in enumerate(files):
      told = facts(n) | {"seed": seed, "number": n, "settings": dataclasses.asdict(self.sampling)}
      part.records.append({"row": index, "file": file, **told})
    self.progress.add(self.num - len(missing))
    return [_Item(part, row, seed, n, path, facts(n)) for n, path in missing]

  def _draw(self, items: list[_Item], size: int) -> jax.Array:
    ((filled, _),) = self.model.batches(items, size)
    given = [[getattr(item, name) for item in filled] for name in ("row", "seed", "number")]
    return self.model.draw(*given, self.sampling)

  def _settle(self, items: list[_Item], written: list) -> None:
    for item, future in zip(items, written, strict=True):
      future.result()
      item.part.left -= 1
      if not item.part.left:
        self._finish(item.part)
    self.progress.add(len(items))

  def _finish(self, part: _Part) -> None:
    for index, files in part.files.items():
      self.prompts.finish(index, self.parts.out, files)
    self.parts.finish(part.inputs, part.records)


def _write(item: _Item, picture: np.ndarray) -> None:
  write_atomically(item.path, encode_png(picture, item.facts))
