"""Pictures to cached CLIP features: the encoder on this process's devices, fed by threads, written shard by shard."""

import dataclasses
import datetime
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blip3o_jax.data import features, transforms
from blip3o_jax.errors import UserError
from blip3o_jax.models.blip3o import Blip3o, Blip3oConfig
from blip3o_jax.porting.source import abstract_params
from blip3o_jax.sharding import rules
from blip3o_jax.types import Params

Encoder = Callable[[np.ndarray], jax.Array]  # uint8 [B, S, S, 3] -> [B, N, C]

_SAY_EVERY = 10.0  # seconds
_print = functools.partial(print, flush=True)


@dataclasses.dataclass(frozen=True)
class Report:
  """What one process did: pictures read, the bad ones among them, seconds without compiling, bytes on disk."""

  pictures: int
  bad: int
  seconds: float
  bytes: int


def feature_shape(config: Blip3oConfig) -> tuple[int, int]:
  """(N, C) of one picture's features."""
  pixels = jax.ShapeDtypeStruct((1, config.clip.image_size, config.clip.image_size, 3), jnp.uint8)
  call = lambda params, x: Blip3o(config).apply({"params": params}, x, method="clip_features")
  return jax.eval_shape(call, abstract_params(config, ("clip",)), pixels).shape[1:]


def make_encoder(config: Blip3oConfig, params: Params, mesh: Mesh, batch_size: int, dtype: str) -> Encoder:
  """The compiled encoder on a mesh, for batches of one size."""
  model = Blip3o(config, dtype=jnp.dtype(dtype))

  def encode(params, pixels):
    with nn.logical_axis_rules(rules.RULES):
      return model.apply({"params": params}, pixels, method="clip_features")

  place = rules.batch_sharding(mesh)
  pixels = jax.ShapeDtypeStruct((batch_size, config.clip.image_size, config.clip.image_size, 3), jnp.uint8)
  with jax.set_mesh(mesh):
    shardings = jax.tree.map(lambda x: x.sharding, params)
    compiled = jax.jit(encode, in_shardings=(shardings, place), out_shardings=place).lower(params, pixels).compile()
  return lambda pixels: compiled(params, jax.device_put(pixels, place))


def write_shards(
  shards: Sequence[tuple[Path, range]],
  squares: Any,
  encode: Encoder,
  *,
  batch_size: int,
  threads: int,
  say: Callable[[str], None] = _print,
) -> Report:
  """Encode and write (file, indices of its samples), one after the other; `squares` has all their samples in order."""
  progress = _Progress(len(squares), say)
  samples = grain.MapDataset.source(squares).to_iter_dataset(grain.ReadOptions(threads, 2 * batch_size))
  records = progress.count(_encoded(iter(samples.batch(batch_size, batch_fn=list)), encode, batch_size))
  for path, rows in shards:
    features.write_shard(path, itertools.islice(records, len(rows)))
  size = sum(path.stat().st_size for path, _ in shards)
  return Report(progress.done, progress.bad, time.monotonic() - progress.start, size)


@dataclasses.dataclass(frozen=True)
class Square:
  """A sample ready for the encoder: pixels [S, S, 3] uint8 and the caption, or what is wrong with it."""

  pixels: np.ndarray
  text: str
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Squares:
  """The samples of a source in a given order, ready for the encoder."""

  pictures: Any
  order: np.ndarray
  size: int
  resize: str

  def __len__(self) -> int:
    return len(self.order)

  def __getitem__(self, i: int) -> Square:
    try:
      record = self.pictures[int(self.order[i])]
      text = record.get("text")
      if not record.get("image") or not isinstance(text, str):
        raise UserError(f"{record['name']} has no {'caption' if record.get('image') else 'picture'}")
      return Square(transforms.square(transforms.decode(record["image"], record["name"]), self.size, self.resize), text)
    except UserError as error:
      return Square(np.zeros((self.size, self.size, 3), np.uint8), "", str(error))


def _encoded(batches: Iterable[list[Square]], encode: Encoder, batch_size: int) -> Iterator[tuple[bytes, str]]:
  """(record, what is wrong) of every sample; the devices are one batch ahead of the host."""

  def rows(batch, encoded):
    for square, row in zip(batch, np.asarray(encoded), strict=False):  # a last batch was filled up
      yield (features.pack_error(square.error) if square.error else features.pack(row, square.text)), square.error

  ahead = None
  for batch in batches:
    pixels = np.zeros((batch_size, *batch[0].pixels.shape), np.uint8)
    pixels[: len(batch)] = [square.pixels for square in batch]
    now = batch, encode(pixels)
    if ahead:
      yield from rows(*ahead)
    ahead = now
  if ahead:
    yield from rows(*ahead)


class _Progress:
  """Counts records and says now and then how far it is."""

  def __init__(self, total: int, say: Callable[[str], None]):
    self.total, self.done, self.bad, self.say = total, 0, 0, say
    self.start = self._said = time.monotonic()

  def count(self, records: Iterable[tuple[bytes, str]]) -> Iterator[bytes]:
    for record, error in records:
      self.done += 1
      if error:
        self.bad += 1
        if self.bad <= 10:
          self.say(f"bad: {error}")
      now = time.monotonic()
      if now - self._said > _SAY_EVERY or self.done == self.total:
        self._said, rate = now, self.done / (now - self.start)
        left = datetime.timedelta(seconds=round((self.total - self.done) / rate))
        bad = f", {self.bad} bad" if self.bad else ""
        self.say(f"{self.done}/{self.total} pictures  {rate:.1f} pictures/s  ETA {left}{bad}")
      yield record
