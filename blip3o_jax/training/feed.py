"""From the loader onto the devices, one batch ahead of the step."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from blip3o_jax.data import pipeline
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.data.vision import ImageProcessor
from blip3o_jax.errors import UserError
from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.models.qwen2_5_vl import Qwen25VLConfig
from blip3o_jax.porting.locate import open_model
from blip3o_jax.porting.source import Source, default_preprocessor
from blip3o_jax.types import Batch


def open_loader(config: ConfigDict, architecture: Blip3oConfig, start_step: int) -> Iterator[dict[str, np.ndarray]]:
  """This process's part of the batches, from `start_step` on.

  Raises:
    UserError: missing data or tokenizer; conversations for a backbone other than Qwen2.5-VL.
  """
  source = open_model(config.init_from) if config.init_from else None
  folder = tokenizer_dir(config, source)
  backbone, pictures = architecture.backbone, {}
  if isinstance(backbone, Qwen25VLConfig):
    preprocessor = source.image_preprocessor() if source else default_preprocessor(architecture)
    processor = ImageProcessor.from_reference(preprocessor)
    pictures = {"processor": processor, "window_size": backbone.vision.window_size}
  elif config.data.task == "conversations":
    raise UserError("data.task conversations prepares pictures for Qwen2.5-VL's tower alone; take such a preset")
  return pipeline.make_loader(
    config.data.to_dict(),
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start_step,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    tokenizer=load_tokenizer(folder) if folder else None,
    **pictures,
  )


def tokenizer_dir(config: ConfigDict, source: Source | None) -> Path | None:
  """The config's own tokenizer, or that of `source`, its init_from, or none."""
  if config.tokenizer:
    return Path(config.tokenizer)
  return source.tokenizer_dir() if source and source.tokenizer else None


class Prefetch:
  """Iterator of global batches: each process's rows [B / processes, ...] become jax.Arrays [B, ...] in `sharding`.

  A thread reads and copies one batch ahead. Text and other keys that no device can hold are left out. Whatever the
  loader raises is raised here, in its turn. Use as a context manager.
  """

  def __init__(self, loader: Iterator[dict[str, np.ndarray]], sharding: NamedSharding):
    self._loader, self._sharding = loader, sharding
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
    return item

  def _run(self) -> None:
    try:
      for batch in self._loader:
        if not self._put({key: self._place(value) for key, value in batch.items() if _is_numeric(value)}):
          return
      self._put(RuntimeError("the data loader ended; a training loader must go on for ever"))
    except BaseException as error:  # to be raised in the training thread
      self._put(error)

  def _place(self, rows: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(self._sharding, np.asarray(rows))

  def _put(self, item) -> bool:
    while not self._stop.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False


def _is_numeric(value) -> bool:
  return np.asarray(value).dtype.kind not in "OSU"
