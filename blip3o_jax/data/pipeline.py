"""Batches of numpy arrays in an order that is a pure function of (seed, global index).

Step s consumes samples [s B, (s + 1) B) of an endless sequence (see data.mixture); the processes of a job take
consecutive parts of every batch. So the position is one integer, valid for any number of processes, reading threads and
worker processes. A bad sample is replaced by another one of its source, at an index that depends on its own alone,
counted and reported.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from blip3o_jax.data.builders import DataConfig, make_builder, require_whole
from blip3o_jax.data.features import FeatureSource
from blip3o_jax.data.mixture import Mixture
from blip3o_jax.data.pictures import Pictures
from blip3o_jax.data.sources import SourceConfig, open_source
from blip3o_jax.errors import UserError

_log = logging.getLogger(__name__)
_REPLACEMENTS = 16  # so many bad samples in a row are no accident
_CHUNK = 16  # rows read at once, at most
_DEATHS = 3  # of worker processes before a batch has come


@dataclasses.dataclass(frozen=True)
class Reading:
  """How samples are read; nothing that is computed depends on it. These, too, are fields of `config.data`.

  threads: in each process; 0: two, so that one reads while the other decodes, but one in each of several workers, where
  a second makes every picture a tenth dearer. Take 16 where reading is waiting, as on gs://. prefetch: samples kept
  ready, over all workers (128 pictures of 448 x 448 are 77 MB). workers: processes that read and decode; 0 = this one
  does it, which is enough for some 80 pictures of 448 x 448 a second from JPEGs of 640 to 1024 pixels; each worker
  gives about as many again. cache: keep built samples in memory, for data that fits there.
  """

  threads: int = 0
  prefetch: int = 128
  workers: int = 0
  cache: bool = False

  def __post_init__(self):
    require_whole(self, threads=0, prefetch=0, workers=0)
    object.__setattr__(self, "threads", self.threads or (1 if self.workers else 2))


def make_loader(
  cfg: Mapping[str, Any],
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  tokenizer=None,
  pictures: Pictures | None = None,
) -> "Batches":
  """Endless batches of this process, from step `start_step` on (any start costs the same).

  Args:
    cfg: fields of DataConfig and Reading; or of Reading and `groups`: DataConfigs by name, for several tasks at once.
    batch_size: B, over all processes and groups.
    tokenizer: data.tokenizer.Tokenizer; every task but images needs it.
    pictures: what prepares them for the understanding tower; conversations need it.

  Returns:
    An endless iterator over dicts with the keys of the task (DESIGN part 3), each [B / process_count, ...],
    `replaced` [B / process_count] bool, and with tokens `cut` [B / process_count] int32: how many did not fit.
    With groups: of such dicts by name of group, each with its part of the rows.

  Raises:
    UserError: unknown keys, missing files, a batch that does not divide, fewer samples than a batch takes.
  """
  configs, reading = parse(cfg)
  tools = {"tokenizer": tokenizer, "pictures": pictures}
  groups = open_groups(configs, batch_size, seed, process_count, **tools)
  return read(groups, reading, start_step, process_index)


def parse(cfg: Mapping[str, Any]) -> tuple[dict[str, DataConfig], Reading]:
  """The groups of a `config.data`, and how to read. One that has no groups is a single one, named "".

  Raises:
    UserError: keys that nothing reads, or lacking ones.
  """
  rest = dict(cfg)
  reading = _fields(Reading, {key: rest.pop(key) for key in vars(Reading()) if key in rest}, "data")
  if "groups" not in rest:
    return {"": _fields(DataConfig, rest, "data")}, reading
  groups = rest.pop("groups")
  if not isinstance(groups, Mapping) or not groups:
    raise UserError(f"data.groups is {groups!r}; give the fields of each group by its name")
  if rest:
    raise UserError(f"data config with groups holds {', '.join(rest)} beside them; put it into the groups")
  configs = {name: _fields(DataConfig, group, f"data.groups.{name}") for name, group in groups.items()}
  if any(config.buckets for config in configs.values()):
    raise UserError("data.groups cannot have buckets: their lengths would have to be agreed group by group")
  return configs, reading


def _fields(kind, values: Mapping[str, Any], where: str):
  known = [field.name for field in dataclasses.fields(kind)]
  if not isinstance(values, Mapping):
    raise UserError(f"{where} config is {values!r}; give its fields: {', '.join(sorted(known))}")
  if unknown := sorted(set(values) - set(known)):
    raise UserError(f"{where} config has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
  if kind is DataConfig and ("task" not in values or bool(values.get("path")) == bool(values.get("sources"))):
    raise UserError(
      f"{where} config needs a task, and either a path or sources; it has {', '.join(values) or 'nothing'}"
    )
  if kind is SourceConfig and not values.get("path"):
    raise UserError(f"{where} config needs a path")
  return kind(**values)


def open_groups(
  configs: Mapping[str, DataConfig], batch_size: int, seed: int, process_count: int = 1, **tools
) -> list["Group"]:
  """The sources, order and builder of every group; `tools`, the result's errors: see make_loader, make_builder."""
  if not isinstance(seed, int) or seed < 0:
    raise UserError(f"seed is {seed!r}; the order of the data takes a whole number from 0 on")
  groups, first = [], seed
  for (name, config), rows in zip(configs.items(), split_rows(configs, batch_size, process_count), strict=True):
    mixture = open_mixture(config)
    _check_size(mixture, rows)
    groups.append(
      Group(name, mixture, mixture.order(first), make_builder(config, **tools), rows, rows // process_count)
    )
    first += len(mixture.names)
  return groups


def read(groups: list["Group"], reading: Reading, start_step: int, process_index: int) -> "Batches":
  """The batches of opened groups, see make_loader."""
  return Batches(lambda step: _dataset(groups, reading, step, process_index), start_step)


class Batches:
  """Iterator over batches from a step on.

  Where a worker process dies (the system kills one when memory is short), others go on from the batch that is due: the
  position is one integer.

  Args:
    read: from a step to the batches from there on.
  """

  def __init__(self, read: Callable[[int], grain.IterDataset], step: int):
    self._read, self._step, self._batches = read, step, iter(read(step))

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> dict[str, Any]:
    """Raises UserError for what is wrong with the data, or where workers die again and again."""
    for _ in range(_DEATHS):
      try:
        batch = next(self._batches)
      except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
          raise
        died = str(error)
        _log.warning("reading goes on with new worker processes: %s", died)
        self.close()
        self._batches = iter(self._read(self._step))
      else:
        self._step += 1
        return batch
    raise UserError(
      f"worker processes die again and again, perhaps for want of memory; take fewer data.workers ({died})"
    )

  def close(self) -> None:
    """End the threads and processes that read."""
    self._batches.close()


def _dataset(groups: list["Group"], reading: Reading, start_step: int, process_index: int) -> grain.IterDataset:
  # The unit is a chunk of rows, not a row: what Grain and the way between processes cost is paid once for all of them.
  rows = _chunk_rows(groups)
  chunks = _Chunks(groups, rows, start_step, process_index, {} if reading.cache else None)
  ahead = max(reading.prefetch // rows, 1)
  dataset = grain.MapDataset.source(chunks).to_iter_dataset(grain.ReadOptions(reading.threads, ahead))
  if reading.workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which only absl.app parses
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(reading.workers, -(-ahead // reading.workers)))
  # Batching comes last: before the worker processes it would give each its own batches, and lose the rest of an epoch.
  parts = [(group.name, group.local // rows) for group in groups]
  return dataset.batch(sum(count for _, count in parts), batch_fn=functools.partial(_join, parts=parts))


def _chunk_rows(groups: list["Group"]) -> int:
  """Rows of a chunk: as many as go evenly into every group's part of a batch, up to _CHUNK."""
  common = np.gcd.reduce([group.local for group in groups])
  return max(rows for rows in range(1, _CHUNK + 1) if common % rows == 0)


def split_rows(configs: Mapping[str, DataConfig], batch_size: int, process_count: int = 1) -> list[int]:
  """Rows of a batch that each group gets.

  Raises:
    UserError: they are not whole on every process (naming the nearest sizes of a batch that would do).
  """
  total = sum(config.rows for config in configs.values())
  unit = total * process_count // np.gcd.reduce([config.rows for config in configs.values()])
  if batch_size % unit:
    nearest = sorted({max(unit, batch_size // unit * unit), -(-batch_size // unit) * unit})
    groups = f" in groups of {' : '.join(str(config.rows) for config in configs.values())}" * (len(configs) > 1)
    raise UserError(
      f"batch_size {batch_size} does not divide over {process_count} processes{groups}; "
      f"take {' or '.join(str(size) for size in nearest)}"
    )
  return [batch_size * config.rows // total for config in configs.values()]


def sources_of(config: DataConfig) -> dict[str, SourceConfig]:
  """The sources of one group by name. Raises UserError for keys that nothing reads, or lacking ones."""
  named = config.sources or {str(config.path): {"path": config.path}}
  return {name: _fields(SourceConfig, fields, f"data.sources.{name}") for name, fields in named.items()}


def open_mixture(config: DataConfig) -> Mixture:
  """The opened sources of one group. Raises UserError for what is wrong with any of them."""
  opened, weights = {}, {}
  for name, source in sources_of(config).items():
    opened[name] = open_source(source, captions=config.task != "images")
    weights[name] = source.weight
    if (cached := isinstance(opened[name], FeatureSource)) != (config.task == "features"):
      raise UserError(f"{name} holds {'features' if cached else 'no cached features'}, data.task is {config.task}")
  return Mixture(opened, weights)


def _check_size(mixture: Mixture, rows: int) -> None:
  for name, size in mixture.sizes().items():
    if size < (wanted := int(rows * mixture.shares[name])):
      raise UserError(f"{name} has {size} samples, a batch takes {wanted}; give it more, or take a smaller batch")


def _join(chunks: list[dict], parts: list[tuple[str, int]]) -> dict[str, Any]:
  batches, start = {}, 0
  for name, count in parts:
    part = chunks[start : start + count]
    batches[name] = part[0] if count == 1 else {key: np.concatenate([c[key] for c in part]) for key in part[0]}
    start += count
  return batches.get("", batches)


@dataclasses.dataclass
class Group:
  """Samples of one task in their order: `batch` of them make its part of a batch, `local` the part of this process.

  name: "" where there is one task only.
  """

  name: str
  mixture: Mixture
  order: grain.MapDataset
  build: Callable[[dict], dict]
  batch: int
  local: int

  def sample(self, index: int) -> dict:
    """Sample `index` of the mixture, or the first good one of a fixed row of others of its source."""
    n = self.mixture.sizes()[self.mixture.source_of(index)]
    for k in range(_REPLACEMENTS):
      # By the golden ratio: far away and spread evenly, since neighbours tend to be bad together.
      try:
        return self.build(self.mixture.record(index, round(k * n * 0.618034))) | {"replaced": np.bool_(k > 0)}
      except UserError as error:
        _warn(error)
        last = error
    raise UserError(f"{_REPLACEMENTS} samples in a row are bad; the last: {last}")


@dataclasses.dataclass
class _Chunks:
  """Built samples of one process, `rows` at a time: those of step start_step, group by group, then of the next step."""

  groups: list[Group]
  rows: int
  start_step: int
  process_index: int
  cache: dict[tuple[str, int], dict] | None = None

  def __len__(self) -> int:
    return sys.maxsize // max(group.batch for group in self.groups) - self.start_step

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    step, offset = divmod(i * self.rows, sum(group.local for group in self.groups))
    for group in self.groups:
      if offset < group.local:
        break
      offset -= group.local
    first = (self.start_step + step) * group.batch + self.process_index * group.local + offset
    samples = [self._sample(group, int(group.order[first + row])) for row in range(self.rows)]
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}

  def _sample(self, group: Group, index: int) -> dict:
    if self.cache is None:
      return group.sample(index)
    key = group.name, index
    if key not in self.cache:
      self.cache[key] = group.sample(index)
    return self.cache[key]


_warned = 0


def _warn(error: UserError) -> None:
  """Tell of a bad sample; of the first ten in this process, as their number is counted anyway."""
  global _warned
  _warned += 1
  if _warned <= 10:
    _log.warning("sample replaced by another: %s", error)
