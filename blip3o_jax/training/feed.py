"""From the loader onto the devices, one batch ahead of the step."""

import math
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from blip3o_jax.data import features, pipeline
from blip3o_jax.data.tokenizer import load_tokenizer, require_same
from blip3o_jax.errors import UserError
from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.porting.locate import open_model
from blip3o_jax.porting.preprocessor import default_preprocessor, open_pictures
from blip3o_jax.porting.source import Source
from blip3o_jax.sharding import distributed
from blip3o_jax.sharding.mesh import reader
from blip3o_jax.types import Batch

COUNTED = ("replaced", "cut")  # what the loader says of each row beside what the step takes


def open_loader(
  config: ConfigDict, architecture: Blip3oConfig, part: tuple[int, int] = (0, 1)
) -> Callable[[int], Iterator[dict[str, Any]]]:
  """A function from a step to one part of the batches from there on; all that is wrong is found here.

  Args:
    part: (i, n) of sharding.mesh.reader.

  Raises:
    UserError: missing data or tokenizer, on any process; another tokenizer than init_from has, or cached features of
      another encoder; conversations for a backbone that sees no pictures.
  """
  configs, reading = pipeline.parse(config.data.to_dict())
  groups, error = [], None
  try:
    tools = preparation(config, architecture)
    groups = pipeline.open_groups(configs, config.batch_size, config.seed, part[1], **tools)
  except UserError as raised:
    error = raised
  _agree([group.mixture.sizes() for group in groups], error)
  return lambda start_step: iter(pipeline.read(groups, reading, start_step, part[0]))


def _agree(sizes: list[dict[str, int]], error: UserError | None) -> None:
  """Raise on every process if one has no data or other data: left alone, the rest would wait for it for ever."""
  seen = np.uint32(0 if error else zlib.crc32(repr([list(size.values()) for size in sizes]).encode()) | 1)
  everyone = distributed.everyone(seen)
  if error:
    raise error
  if lacking := np.flatnonzero(everyone == 0).tolist():
    raise UserError(f"processes {lacking} could not open their data; each tells why on its own host")
  if other := np.flatnonzero(everyone != everyone[0]).tolist():
    raise UserError(f"processes {other} see other data than process 0; here: {sizes}. Give all hosts the same files")


def preparation(config: ConfigDict, architecture: Blip3oConfig) -> dict[str, Any]:
  """What of a model the pipeline needs: tokenizer, and what prepares pictures to be understood.

  Raises:
    UserError: see open_loader.
  """
  source = open_model(config.init_from) if config.init_from else None
  folder = tokenizer_dir(config, source)
  if config.tokenizer and source and source.tokenizer:
    require_same(folder, source.tokenizer_dir())
  for group in pipeline.parse(config.data.to_dict())[0].values():
    if group.task == "features":
      weights = source.content_hash("clip") if source and "clip" in source.components else None
      for path in (path for one in pipeline.sources_of(group).values() for path in one.paths):
        features.check(path, features.identity(weights, architecture.clip, group.resize))
  preprocessor = source.image_preprocessor() if source else default_preprocessor(architecture)
  return {
    "tokenizer": load_tokenizer(folder) if folder else None,
    "pictures": open_pictures(architecture, preprocessor),
  }


def cached(config: ConfigDict, architecture: Blip3oConfig) -> bool:
  """Whether batches bring the features of the CLIP encoder, which is then not needed: not on the devices, nowhere.

  Raises:
    UserError: they do, for a design that learns something else.
  """
  tasks = {group.get("task") for group in config.data.get("groups", {"": config.data}).values()}
  if "features" in tasks and architecture.design == "vae_flow":
    raise UserError(
      "data.task features are those of CLIP, the design vae_flow learns latents; take data.task generation"
    )
  return "features" in tasks and "generation" not in tasks


def require_whole_groups(config: ConfigDict, parts: int) -> None:
  """Raise UserError unless the rows that each of `data.groups` has of a batch divide into so many parts: devices over
  which a batch is cut, times those that are accumulated."""
  if "groups" not in config.data:
    return
  rows = [group.rows for group in pipeline.parse(config.data.to_dict())[0].values()]
  unit = parts * sum(rows) // math.gcd(*rows)
  if config.batch_size % unit:
    raise UserError(
      f"batch_size {config.batch_size} does not divide into data.groups of {' : '.join(map(str, rows))} rows over "
      f"{parts} parts (devices that share a batch, times config.accumulate); take a multiple of {unit}"
    )


def tokenizer_dir(config: ConfigDict, source: Source | None) -> Path | None:
  """The config's own tokenizer, or that of `source`, its init_from, or none."""
  if config.tokenizer:
    return Path(config.tokenizer)
  return source.tokenizer_dir() if source and source.tokenizer else None


class Prefetch:
  """Iterator of global batches: a process's part of the rows (mesh.reader) becomes jax.Arrays [B, ...] in `sharding`.

  A thread reads and copies one batch ahead. Text and other keys that no device can hold are left out, and so are those
  that only count. Groups of keys stay groups. Whatever the loader raises is raised here, in its turn. Use as a context
  manager.

  Attributes:
    counts: `rows_replaced` by others and `rows_cut` to fit, of this process since it began.
  """

  def __init__(self, loader: Iterator[dict[str, Any]], sharding: NamedSharding):
    self._loader, self._sharding = loader, sharding
    _, self._parts = reader(sharding.mesh, jax.process_index())
    self.counts = {f"rows_{name}": 0 for name in COUNTED}
    self._queue: queue.Queue = queue.Queue(maxsize=1)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

  def __enter__(self) -> "Prefetch":
    self._thread.start()
    return self

  def __exit__(self, *error) -> None:
    self._stop.set()
    self._thread.join(timeout=10)
    if close := getattr(self._loader, "close", None):
      if not self._thread.is_alive():
        close()

  def __next__(self) -> Batch:
    item = self._queue.get()
    if isinstance(item, BaseException):
      raise item
    batch, counts = item
    self.counts = {name: self.counts[name] + count for name, count in counts.items()}
    return batch

  def _run(self) -> None:
    try:
      for batch in self._loader:
        if not self._put((self._place(batch), {f"rows_{name}": _count(batch, name) for name in COUNTED})):
          return
      self._put(RuntimeError("the data loader ended; a training loader must go on for ever"))
    except BaseException as error:  # to be raised in the training thread
      self._put(error)

  def _place(self, batch: dict[str, Any]) -> Batch:
    placed = {}
    for key, rows in batch.items():
      if isinstance(rows, dict):
        placed[key] = self._place(rows)
      elif key not in COUNTED and _is_numeric(rows):
        rows = np.asarray(rows)
        shape = len(rows) * self._parts, *rows.shape[1:]
        placed[key] = jax.make_array_from_process_local_data(self._sharding, rows, shape)
    return placed

  def _put(self, item) -> bool:
    while not self._stop.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False


def _count(batch: dict[str, Any], name: str) -> int:
  return sum(
    _count(rows, name) if isinstance(rows, dict) else int(np.count_nonzero(rows))
    for key, rows in batch.items()
    if key == name or isinstance(rows, dict)
  )


class Buckets:
  """Batches cut to the shortest of a few lengths that holds their longest row. Exact, for what is cut is padding.

  The length must be the same on every process, as it chooses the program. So the longest row is found on the devices,
  by a program that every process starts just before the step of the batch before, and it is read when that step has
  been started: all agree by one integer, and nobody waits for it. The order of batches is untouched.
  """

  ROWS = ("tokens", "token_mask", "labels", "positions")  # their last axis is the length

  def __init__(self, batches: Iterator[Batch], lengths: tuple[int, ...], sharding: NamedSharding):
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    self._longest = jax.jit(lambda mask: jnp.max(jnp.sum(mask, axis=-1)), out_shardings=replicated)
    self._cut = jax.jit(
      lambda rows, n: {k: x[..., :n] for k, x in rows.items()}, static_argnums=1, out_shardings=sharding
    )
    self._batches = batches
    self._ahead = self._read()
    self._lengths = (*lengths, self._ahead[0]["token_mask"].shape[-1])

  def compile(self, program, say: Callable = print) -> Callable:
    """`program.step` for every length, all of them compiled here, before the first step."""
    steps = {}
    for n in self._lengths:
      start = time.monotonic()
      steps[n] = program.step.lower(program.state, program.frozen, self._cut_to(self._ahead[0], n)).compile()
      say(f"compiled for {n} tokens in {time.monotonic() - start:.1f} s")
    return lambda state, frozen, batch: steps[batch["token_mask"].shape[-1]](state, frozen, batch)

  def __next__(self) -> Batch:
    (batch, longest), self._ahead = self._ahead, self._read()
    longest = int(longest)
    return self._cut_to(batch, min(n for n in self._lengths if n >= longest))

  def _read(self) -> tuple[Batch, jax.Array]:
    batch = next(self._batches)
    return batch, self._longest(batch["token_mask"])

  def _cut_to(self, batch: Batch, n: int) -> Batch:
    return batch | self._cut({key: batch[key] for key in self.ROWS if key in batch}, n)


def _is_numeric(value) -> bool:
  return np.asarray(value).dtype.kind not in "OSU"
