"""Random access to samples on disk (the protocol of `grain.sources.RandomAccessDataSource`).

`TarSource` reads uncompressed WebDataset shards in place, `JsonlSource` rows with image files beside them. Records are
plain dicts of undecoded bytes. What is wrong with the files as a whole is a UserError when a source is opened; what is
wrong with one sample is a UserError when it is read, and data.pipeline puts another sample in its place.
"""

import bisect
import glob
import json
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np

from blip3o_jax.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class _Files:
  """Positional reads from files that open on first use, once a process; pickles as a list of paths."""

  def __init__(self, paths: list[str]):
    self.paths = paths
    self._open()

  def _open(self) -> None:
    self._handles: dict[tuple[int, str], int] = {}
    self._lock = threading.Lock()

  def __getstate__(self):
    return self.paths

  def __setstate__(self, paths):
    self.paths = paths
    self._open()

  def read(self, path: str, offset: int, size: int) -> bytes:
    key = (os.getpid(), path)  # a forked child must not share the parent's handles
    with self._lock:
      if key not in self._handles:
        self._handles[key] = os.open(path, os.O_RDONLY)
    return os.pread(self._handles[key], size, offset)


class TarSource:
  """Samples of WebDataset tars: members `<key>.<image extension>` and `<key>.txt` in one shard are one sample.

  Args:
    path: a tar, a folder of tars, a glob pattern, or a list of these; shards in sorted order.
    cache: keep the index of each shard in a folder `.index` beside it (in memory only where that cannot be written).

  Raises:
    UserError: no shard, a compressed or truncated shard, a member without a partner, two members of one name.
  """

  def __init__(self, path, cache: bool = True):
    self.shards = _shards(path)
    indices = [_index(shard, cache) for shard in self.shards]
    self._keys = [keys for keys, _ in indices]
    self._spans = [spans for _, spans in indices]
    self._starts = np.cumsum([0] + [len(keys) for keys in self._keys]).tolist()
    self._files = _Files(self.shards)
    if not len(self):
      raise UserError(f"no samples in {self.shards[0]}{' and others' if len(self.shards) > 1 else ''}")

  def __len__(self) -> int:
    return self._starts[-1]

  def __repr__(self) -> str:
    return f"TarSource({len(self.shards)} shards, {len(self)} samples)"

  def __getitem__(self, index: int) -> dict:
    """{"image": bytes, "text": str, "name": "shard: key"}. Raises UserError for a caption that is not UTF-8."""
    shard = bisect.bisect_right(self._starts, index) - 1
    row = index - self._starts[shard]
    path = self.shards[shard]
    name = f"{path}: {bytes(self._keys[shard][row]).decode(errors='replace')}"
    image_at, image_size, text_at, text_size = self._spans[shard][row].tolist()
    try:
      text = self._files.read(path, text_at, text_size).decode()
    except UnicodeDecodeError:
      raise UserError(f"caption {name}.txt is not UTF-8") from None
    return {"image": self._files.read(path, image_at, image_size), "text": text.strip(), "name": name}


def _shards(path) -> list[str]:
  """Paths of all tars meant by `path`, sorted."""
  found: list[str] = []
  for one in [path] if isinstance(path, str | os.PathLike) else path:
    one = os.fspath(one)
    matches = glob.glob(os.path.join(one, "*.tar")) if os.path.isdir(one) else glob.glob(one)
    if not matches:
      raise UserError(f"no tar shards at {one}; give a .tar, a folder of them or a glob pattern")
    found += matches
  return sorted(set(found))


def _index(shard: str, cache: bool) -> tuple[np.ndarray, np.ndarray]:
  """Keys [n] bytes and spans [n, 4] int64 (offset and size of image and caption) of one shard, in order of the tar."""
  stat = os.stat(shard)
  stamp = np.array([stat.st_size, stat.st_mtime_ns])
  stored = Path(shard).parent / ".index" / (Path(shard).name + ".npz")
  if cache and stored.exists():
    try:
      with np.load(stored) as arrays:
        if np.array_equal(arrays["stamp"], stamp):
          return arrays["keys"], arrays["spans"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      pass  # a damaged cache is made again
  keys, spans = _read_headers(shard)
  if cache:
    temporary = stored.with_name(f".{stored.stem}.{os.getpid()}.npz")
    try:
      stored.parent.mkdir(exist_ok=True)
      np.savez(temporary, stamp=stamp, keys=keys, spans=spans)
      os.replace(temporary, stored)
    except OSError:
      pass  # read-only data
  return keys, spans


def _read_headers(shard: str) -> tuple[np.ndarray, np.ndarray]:
  pairs: dict[str, dict[str, tuple[int, int]]] = {}
  last, end = "the start", 0
  try:
    with tarfile.open(shard, "r:") as tar:
      for member in tar:
        last, end = member.name, member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if not member.isfile():
          continue
        folder, _, file = member.name.rpartition("/")
        stem, _, extension = file.rpartition(".")
        extension = extension.lower()
        kind = "image" if extension in IMAGE_EXTENSIONS else "text" if extension == "txt" else None
        if kind is None or not stem:
          continue  # other members (.json, .cls) belong to other readers
        pair = pairs.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if kind in pair:
          raise UserError(f"shard {shard} holds {member.name} twice (or two images of one key); make its keys unique")
        pair[kind] = (member.offset_data, member.size)
    # The module takes a header that is cut off for the end; a whole tar ends in blocks of zeros.
    with open(shard, "rb") as file:
      file.seek(end)
      if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError
  except tarfile.ReadError:
    with open(shard, "rb") as file:
      packed = file.read(4)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
    if packed:
      raise UserError(f"shard {shard} is compressed; unpack it: only plain tars allow random access") from None
    raise UserError(f"shard {shard} is truncated or no tar, after member {last}; fetch it again") from None
  for key, pair in pairs.items():
    if len(pair) < 2:
      lacks = "caption .txt" if "image" in pair else "image"
      raise UserError(f"shard {shard}: {key} has no {lacks}; every sample needs an image and a .txt")
  spans = np.array([[*pair["image"], *pair["text"]] for pair in pairs.values()], np.int64).reshape(-1, 4)
  return np.array([key.encode() for key in pairs], np.bytes_), spans


class JsonlSource:
  """Rows of a JSON-lines file with image paths: {"image": path or null, ...}, paths relative to the file (or `root`).

  Args:
    path: the file.
    root: folder of the images; default the folder of the file.

  Raises:
    UserError: no such file, or no rows.
  """

  def __init__(self, path, root=None):
    self.path = os.fspath(path)
    self.root = os.fspath(root) if root else os.path.dirname(self.path)
    if not os.path.isfile(self.path):
      raise UserError(f"no such file: {self.path}")
    with open(self.path, "rb") as file:
      sizes = [len(line) for line in file]
    self._starts = np.cumsum([0, *sizes], dtype=np.int64)
    if not sizes:
      raise UserError(f"{self.path} has no rows")
    self._files = _Files([self.path])

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __repr__(self) -> str:
    return f"JsonlSource({self.path}, {len(self)} rows)"

  def __getitem__(self, index: int) -> dict:
    """The row with "image" as bytes (or None) and "name". Raises UserError for a bad row or a missing picture."""
    start, end = self._starts[index : index + 2].tolist()
    name = f"{self.path}: line {index + 1}"
    try:
      row = json.loads(self._files.read(self.path, start, end - start))
    except ValueError as error:
      raise UserError(f"{name} is not JSON: {error}") from None
    if not isinstance(row, dict):
      raise UserError(f"{name} is not a JSON object")
    image = row.get("image")
    if image is not None:
      try:
        image = Path(self.root, image).read_bytes()
      except (OSError, TypeError) as error:
        raise UserError(f"{name}: picture {image!r} cannot be read ({error})") from None
    return row | {"image": image, "name": name}
