"""CLIP features on disk, computed once by `blip3o data cache-features`: ArrayRecord shards and a manifest.

clip_features.json                         what they were made of: encoder, preprocessing, data
features-00003-of-00016.array_record       msgpack maps {"features": bytes, "text": str}, of a bad one {"error": str}

64 x 1792 features in bfloat16 are 229,376 bytes. Record i is sample i of the data, a bad picture keeps its place, so
training draws the same samples in the same order as from the pictures.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from blip3o_jax.data import files
from blip3o_jax.data.outputs import differences, remove_stale, replacing, write_atomically
from blip3o_jax.data.records import open_records
from blip3o_jax.data.vision import CLIP_MEAN, CLIP_STD
from blip3o_jax.errors import UserError

MANIFEST = "clip_features.json"
_INERT = ("remat", "norm_init")  # settings of the encoder that change no number it gives


def identity(weights: str | None, clip: Any, resize: str) -> dict[str, Any]:
  """All that features depend on beside the pictures.

  Args:
    weights: content hash of the encoder, None if it is not known.
    clip: its configuration, an EvaClipConfig or a SiglipConfig.
    resize: how a picture becomes a square, see transforms.square.
  """
  settings = {key: value for key, value in dataclasses.asdict(clip).items() if key not in _INERT}
  known = {"weights": weights} if weights else {}
  settings["kind"] = type(clip).__name__
  return known | settings | {"resize": resize, "mean": list(CLIP_MEAN), "std": list(CLIP_STD)}


@dataclasses.dataclass(frozen=True)
class Manifest:
  """clip_features.json.

  Attributes:
    encoder: see `identity`. shape: (N, C) of a picture's features. dtype: bfloat16 | float32.
    data: where the pictures were. samples: how many. shard_size: records a shard; the last may hold fewer.
  """

  encoder: dict[str, Any]
  shape: tuple[int, int]
  dtype: str
  data: list[str]
  samples: int
  shard_size: int

  @property
  def shards(self) -> list[tuple[str, range]]:
    """(file name, indices of its samples) of every shard."""
    count = -(-self.samples // self.shard_size)
    span = lambda i: range(i * self.shard_size, min((i + 1) * self.shard_size, self.samples))
    return [(f"features-{i:05d}-of-{count:05d}.array_record", span(i)) for i in range(count)]

  def write(self, directory: str | os.PathLike) -> None:
    """Write it, whole or not at all."""
    content = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
    write_atomically(Path(directory, MANIFEST), content.encode())


def read_manifest(directory: str | os.PathLike) -> Manifest:
  """The manifest of a directory of features. Raises UserError if there is none, or it cannot be read."""
  path = Path(directory, MANIFEST)
  if not path.exists():
    raise UserError(f"no cached features at {directory}; make them with `blip3o data cache-features`")
  try:
    fields = json.loads(files.read(os.fspath(path)))
    return Manifest(**fields | {"shape": tuple(fields["shape"])})
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(f"{path} is damaged ({error}); cache the features again, into another folder") from None


def check(directory: str | os.PathLike, wanted: Mapping[str, Any]) -> None:
  """Refuse features that another encoder or preprocessing made. `wanted`: see `identity`; raises UserError."""
  made = read_manifest(directory).encoder
  if differing := differences(made, {**made, **wanted}).values():
    raise UserError(
      f"{directory}: stale features, {'; '.join(differing)}; cache them again with this model, into another folder"
    )


def pack(features: np.ndarray, text: str) -> bytes:
  """The record of a good picture."""
  return msgpack.packb({"features": features.tobytes(), "text": text})


def pack_error(why: str) -> bytes:
  """The record of a bad one."""
  return msgpack.packb({"error": why})


def write_shard(path: Path, records: Iterable[bytes]) -> None:
  """Write one shard; it appears when it is complete. What a killed process left of it is removed."""
  remove_stale([path])
  with replacing(path) as temporary:
    # Every record stands alone, for random access; features hardly compress.
    writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1,uncompressed")
    for record in records:
      writer.write(record)
    writer.close()
    with temporary.open("rb") as file:
      os.fsync(file.fileno())


class FeatureSource:
  """Random access to cached features (the protocol of data.sources).

  Raises:
    UserError: no features there, or not all of them yet.
  """

  def __init__(self, directory: str | os.PathLike):
    self.manifest = read_manifest(directory)
    self._paths = [Path(directory, name) for name, _ in self.manifest.shards]
    if missing := sum(not path.exists() for path in self._paths):
      raise UserError(
        f"{directory}: {missing} of {len(self._paths)} shards are missing; "
        "run the same `blip3o data cache-features` again"
      )
    # With their sizes given, no file is opened before it is needed.
    sized = [f"{path}[0:{len(rows)}]" for path, (_, rows) in zip(self._paths, self.manifest.shards, strict=True)]
    files.keep_open(len(sized))
    self._records = open_records(sized)

  def __len__(self) -> int:
    return self.manifest.samples

  def __repr__(self) -> str:
    return f"FeatureSource({len(self._paths)} shards, {len(self)} samples)"

  def __getitem__(self, index: int) -> dict:
    """{"features": [N, C], "text": str, "image": None, "name": str}.

    Raises:
      UserError: the picture was bad, or the shard is damaged.
    """
    path = self._paths[index // self.manifest.shard_size]
    name = f"{path}: sample {index}"
    try:
      record = msgpack.unpackb(self._records[index])
      if "error" not in record:
        features = np.frombuffer(record["features"], np.dtype(self.manifest.dtype)).reshape(self.manifest.shape)
        return {"features": features, "text": record["text"], "image": None, "name": name}
      why = record["error"]
    except Exception as error:  # whatever the bytes lead the libraries to
      words = " ".join(str(error).split())[:200]
      why = f"{words}; if the shard is damaged, remove it and run the same `blip3o data cache-features` again"
    raise UserError(f"{name}: {why}")
