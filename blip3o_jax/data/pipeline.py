"""Batches of numpy arrays in an order that is a pure function of (seed, global index).

Step s consumes samples [s B, (s + 1) B) of an endless sequence that goes through the data once an epoch, in a new order
each time; the processes of a job take consecutive parts of every batch. So the position is one integer, valid for any
number of processes. A bad sample is replaced by another one, at an index that depends on its own alone, counted and
reported.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from blip3o_jax.data import sources, templates, transforms, vision
from blip3o_jax.data.vision import ImageProcessor
from blip3o_jax.errors import UserError

_log = logging.getLogger(__name__)
_REPLACEMENTS = 16  # so many bad samples in a row are no accident


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where a stage's samples are and how one becomes arrays.

  task: images | captions | generation | conversations. path: shards (TarSource) or a .jsonl (JsonlSource).
  image_size: side of `pixels`; resize: crop | squash. max_length: tokens a row. max_patches: patches a row.
  buckets: shorter lengths to which training cuts a batch whose rows all fit (see training.feed.Buckets); () = never.
  form, wording: see templates.generation_prompt. threads, workers: readers; with workers > 0 processes do the decoding.
  cache: keep built samples in memory, for data that fits there.
  """

  task: str
  path: str
  image_size: int = 64
  resize: str = "crop"
  max_length: int = 64
  buckets: tuple[int, ...] = ()
  max_patches: int = 0
  form: str = "inference"
  wording: str = "release"
  threads: int = 2
  prefetch: int = 128
  workers: int = 0
  cache: bool = False

  def __post_init__(self):
    lengths = (0, *self.buckets, self.max_length)
    if any(a >= b for a, b in zip(lengths, lengths[1:], strict=False)):
      raise UserError(f"data.buckets {self.buckets} must rise and stay below max_length {self.max_length}")
    if self.buckets and self.task == "images":
      raise UserError("data.buckets cuts rows of tokens, which task images has none of; leave it out")


def make_loader(cfg, **settings) -> Iterator[dict[str, np.ndarray]]:
  """An iterator over `make_dataset(cfg, **settings)`."""
  return iter(make_dataset(cfg, **settings))


def make_dataset(
  cfg,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  tokenizer=None,
  processor: ImageProcessor | None = None,
  window_size: int = 112,
) -> grain.IterDataset:
  """Endless batches of this process, from step `start_step` on (any start costs the same).

  Args:
    cfg: DataConfig, or a mapping of its fields.
    batch_size: B, over all processes.
    tokenizer: data.tokenizer.Tokenizer; every task but images needs it.
    processor, window_size: the picture layout of the understanding tower, for conversations (see data.vision).

  Returns:
    An endless Grain dataset of dicts with the keys of the task (DESIGN part 3), each [B / process_count, ...].

  Raises:
    UserError: unknown keys, missing files, a batch that does not divide.
  """
  cfg = _config(cfg)
  if batch_size % process_count:
    raise UserError(f"batch_size {batch_size} does not divide over {process_count} processes")
  source = open_source(cfg.path)
  build = make_builder(cfg, tokenizer, processor, window_size)
  order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
  local = batch_size // process_count
  samples = _Samples(source, build, order, batch_size, local, start_step, process_index, {} if cfg.cache else None)
  dataset = grain.MapDataset.source(samples).to_iter_dataset(grain.ReadOptions(cfg.threads, cfg.prefetch))
  if cfg.workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which only absl.app parses
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(cfg.workers, per_worker_buffer_size=cfg.prefetch))
  # Batching comes last: before the worker processes it would give each its own batches, and lose the rest of an epoch.
  return dataset.batch(local, batch_fn=_stack)


def _config(cfg) -> DataConfig:
  if isinstance(cfg, DataConfig):
    return cfg
  fields = {field.name for field in dataclasses.fields(DataConfig)}
  unknown = sorted(set(cfg) - fields)
  if unknown:
    raise UserError(f"data config has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
  missing = sorted({"task", "path"} - set(cfg))
  if missing:
    raise UserError(f"data config lacks {', '.join(missing)}")
  return DataConfig(**cfg)


def open_source(path):
  """JsonlSource for a .jsonl file, else TarSource."""
  return sources.JsonlSource(path) if str(path).endswith(".jsonl") else sources.TarSource(path)


def _stack(samples: list[dict]) -> dict[str, np.ndarray]:
  return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


@dataclasses.dataclass
class _Samples:
  """Built samples of one process: index i is sample i % local of its part of batch start_step + i // local."""

  source: object
  build: Callable[[dict], dict]
  order: grain.MapDataset
  batch: int
  local: int
  start_step: int
  process_index: int
  cache: dict[int, dict] | None = None
  replaced: int = 0

  def __len__(self) -> int:
    return sys.maxsize // self.batch - self.start_step

  def __getitem__(self, i: int) -> dict:
    step, offset = divmod(i, self.local)
    index = int(self.order[(self.start_step + step) * self.batch + self.process_index * self.local + offset])
    if self.cache is None:
      return self.sample(index)
    if index not in self.cache:
      self.cache[index] = self.sample(index)
    return self.cache[index]

  def sample(self, index: int) -> dict:
    """Sample `index` of the source, or the next good one after it at a fixed stride."""
    n = len(self.source)
    stride = 7919 % n or 1  # far away: neighbours tend to be bad together
    for k in range(_REPLACEMENTS):
      try:
        return self.build(self.source[(index + k * stride) % n])
      except UserError as error:
        self.replaced += 1
        if self.replaced <= 10:
          _log.warning("sample replaced by another: %s", error)
        last = error
    raise UserError(f"{_REPLACEMENTS} samples in a row are bad; the last: {last}")


# ---- one sample


def make_builder(
  cfg: DataConfig, tokenizer=None, processor: ImageProcessor | None = None, window_size: int = 112
) -> Callable[[dict], dict]:
  """The function from a record of a source to the arrays of one sample, for `cfg.task`."""
  builders = {"images": _Images, "captions": _Captions, "generation": _Generation, "conversations": _Conversations}
  if cfg.task not in builders:
    raise UserError(f"data task {cfg.task!r} is unknown; choose one of {', '.join(builders)}")
  if cfg.task != "images" and tokenizer is None:
    raise UserError(f"data task {cfg.task} needs a tokenizer")
  if cfg.task == "conversations" and (processor is None or not cfg.max_patches):
    raise UserError("data task conversations needs an image processor and max_patches")
  return builders[cfg.task](cfg, tokenizer, processor, window_size)


@dataclasses.dataclass(frozen=True)
class _Builder:
  cfg: DataConfig
  tokenizer: Any
  processor: ImageProcessor | None
  window_size: int

  def pixels(self, record: dict) -> np.ndarray:
    if not record.get("image"):
      raise UserError(f"{record['name']} has no picture")
    return transforms.square(transforms.decode(record["image"], record["name"]), self.cfg.image_size, self.cfg.resize)

  def text(self, record: dict) -> str:
    text = record.get("text", record.get("caption"))
    if not isinstance(text, str):
      raise UserError(f"{record['name']} has no caption")
    return text

  def row(self, tokens: list[int]) -> dict[str, np.ndarray]:
    """tokens [L] int32 and token_mask [L] bool: cut to max_length, padded on the right."""
    return {
      "tokens": _pad(tokens, self.cfg.max_length, self.tokenizer.pad),
      "token_mask": np.arange(self.cfg.max_length) < len(tokens),
    }


class _Images(_Builder):
  """pixels [H, W, 3] uint8."""

  def __call__(self, record: dict) -> dict[str, np.ndarray]:
    return {"pixels": self.pixels(record)}


class _Captions(_Builder):
  """pixels, and the tokens and token_mask of the bare caption."""

  def __call__(self, record: dict) -> dict[str, np.ndarray]:
    return {"pixels": self.pixels(record)} | self.row(self.tokenizer.encode(self.text(record)))


class _Generation(_Builder):
  """pixels; tokens and token_mask of the prompt, its last token the image start; positions [3, L], all axes alike."""

  def __call__(self, record: dict) -> dict[str, np.ndarray]:
    cfg = self.cfg
    tokens = templates.generation_prompt(
      self.tokenizer, self.text(record), form=cfg.form, wording=cfg.wording, max_length=cfg.max_length
    )
    positions = np.where(np.arange(cfg.max_length) < len(tokens), np.arange(cfg.max_length), 0)
    positions = np.broadcast_to(positions.astype(np.int32), (3, cfg.max_length))
    return {"pixels": self.pixels(record), "positions": positions} | self.row(tokens)


class _Conversations(_Builder):
  """tokens, token_mask, labels [L], positions [3, L], and the patches of the row's picture, if it has one."""

  def __call__(self, record: dict) -> dict[str, np.ndarray]:
    cfg, merge = self.cfg, self.processor.merge_size
    numbers = {"merge_size": merge, "window_size": self.window_size, "patch_size": self.processor.patch_size}
    if record["image"]:
      patches, grid = self.processor(transforms.decode(record["image"], record["name"]))
    else:
      patches, grid = (
        np.zeros((0, 3 * self.processor.temporal_patch_size * self.processor.patch_size**2)),
        np.zeros((0, 3)),
      )
    seen = vision.pad_rows([(patches, grid)], length=cfg.max_patches, images=1, **numbers)
    tokens, labels = templates.conversation(
      self.tokenizer, _turns(record), [len(patches) // merge**2] if record["image"] else []
    )
    row = self.row(tokens) | {"labels": _pad(labels, cfg.max_length, templates.IGNORE)}
    if not (row["labels"] != templates.IGNORE).any():
      raise UserError(f"{record['name']} has no answer within {cfg.max_length} tokens")
    positions, _ = vision.rope_index(
      row["tokens"][None],
      row["token_mask"][None],
      seen["grid_thw"],
      image_token=self.tokenizer.image_pad,
      merge_size=merge,
    )
    return row | {"positions": positions[0]} | {key: value[0] for key, value in seen.items()}


def _turns(record: dict) -> list[tuple[str, str]]:
  """LLaVA's "conversations" as (human, assistant) pairs."""
  try:
    messages = [(message["from"], message["value"]) for message in record["conversations"]]
    roles = [role for role, _ in messages]
    if not messages or roles != ["human", "gpt"] * (len(messages) // 2):
      raise ValueError
  except (KeyError, TypeError, ValueError):
    raise UserError(f"{record['name']}: conversations must be human and gpt messages in turn") from None
  texts = [text for _, text in messages]
  return list(zip(texts[::2], texts[1::2], strict=True))


def _pad(values: list[int], length: int, fill: int) -> np.ndarray:
  values = np.asarray(values[:length], np.int32)
  return np.pad(values, (0, length - len(values)), constant_values=fill)
