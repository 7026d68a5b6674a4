"""WebDataset shards: uncompressed tars, read in place through an index of where each sample lies; and written."""

import bisect
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import logging
import multiprocessing
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from blip3o_jax.data import files
from blip3o_jax.data.outputs import write_atomically
from blip3o_jax.errors import Problems, UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_BLOCK = tarfile.BLOCKSIZE  # a header is one block, and data begin on one
_GAP = 1 << 16  # picture and caption of a sample so near to each other are read at once
_THREADS = 32  # shards opened at once: in a bucket each costs a round trip

_log = logging.getLogger(__name__)


def write(path: str | os.PathLike, members: Iterable[tuple[str, bytes]]) -> None:
  """Write a shard of (name, content), whole or not at all; equal members are equal bytes, headers hold no time."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  write_atomically(path, buffer.getvalue())


class TarSource:
  """Samples of tars: members `<key>.<image extension>` and `<key>.txt` in one shard are one sample. A shard may hold
  pictures alone, for those who need no captions.

  The index of a shard (16 bytes a sample) is made on first use and kept in a folder `.index` beside it, or, where that
  cannot be written, in the user's cache; it is mapped into memory, so worker processes share it. `blip3o data index`
  makes it beforehand. Every read checks the tar's own header, so a shard that has changed since gives bad samples, not
  wrong ones.

  Args:
    shards: paths, local or in a bucket, in the order of the samples.
    captions: refuse shards of pictures alone.

  Raises:
    UserError: a compressed or truncated shard, a member without a partner, two members of one name, no samples at all.
  """

  def __init__(self, shards: list[str], captions: bool = True):
    self.shards = shards
    files.keep_open(len(shards))  # a mapped index keeps its file open
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      self._rows = list(pool.map(index_shard, shards))
    bare = [shard for shard, rows in zip(shards, self._rows, strict=True) if len(rows) and rows[0, 2] == 0]
    if captions and bare:
      raise UserError(f"shard {bare[0]} holds pictures without captions (.txt); `blip3o data caption` writes them")
    self._starts = np.cumsum([0] + [len(rows) for rows in self._rows]).tolist()
    if not len(self):
      raise UserError(f"no samples in {shards[0]}{' and others' if len(shards) > 1 else ''}")

  def __getstate__(self):
    # Mapped indices go to worker processes by name; the few that have no file go as they are.
    return self.__dict__ | {"_rows": [getattr(rows, "filename", None) or rows for rows in self._rows]}

  def __setstate__(self, state):
    self.__dict__ |= state
    self._rows = [np.load(rows, mmap_mode="r") if isinstance(rows, str | Path) else rows for rows in self._rows]

  def __len__(self) -> int:
    return self._starts[-1]

  def __repr__(self) -> str:
    return f"TarSource({len(self.shards)} shards, {len(self)} samples)"

  def __getitem__(self, index: int) -> dict:
    """{"image": bytes, "text": str, "name": "shard: key"}; of a shard of pictures alone without "text".

    Raises:
      UserError: the shard cannot be read or has changed, or the caption is not UTF-8.
    """
    shard = bisect.bisect_right(self._starts, index) - 1
    path = self.shards[shard]
    image_block, image_size, text_block, text_size = self._rows[shard][index - self._starts[shard]].tolist()
    image_at, text_at = image_block * _BLOCK, (text_block or image_block) * _BLOCK
    first, last = min(image_at, text_at) - _BLOCK, max(image_at + image_size, text_at + text_size)
    if last - first <= image_size + text_size + _GAP:
      content = files.read(path, first, last - first)
      piece = lambda at, size: content[at - first : at - first + size]
    else:
      piece = lambda at, size: files.read(path, at, size)
    name = f"{path}: {_key(path, piece(image_at - _BLOCK, _BLOCK), image_size)}"
    if not text_block:
      return {"image": piece(image_at, image_size), "name": name}
    try:
      text = piece(text_at, text_size).decode()
    except UnicodeDecodeError:
      raise UserError(f"caption {name}.txt is not UTF-8") from None
    return {"image": piece(image_at, image_size), "text": text.strip(), "name": name}


def _key(path: str, header: bytes, size: int) -> str:
  """The key that a member's header names. Raises UserError where there is no header of a member of this size."""
  try:
    member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
  except tarfile.HeaderError:
    member = None
  if member is None or member.size != size:
    raise UserError(f"{path} is not what its index says: damaged, or written anew while it was in use; fetch it again")
  return member.name.rpartition(".")[0]


# ---- the index


def index(path, processes: int) -> Iterator[tuple[str, int]]:
  """Index all shards at a path and leave the indices beside them, in so many processes; yields (shard, its samples).

  Raises:
    Problems: all that is wrong with any of them; the indices of the others are there.
  """
  shards, problems = [file for one in files.expand(path) for file in _shards(one)], []
  context = multiprocessing.get_context("spawn")  # what runs in this process has threads, which do not survive a fork
  with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
    tasks = {pool.submit(_index_beside, shard): shard for shard in shards}
    for task in concurrent.futures.as_completed(tasks):
      try:
        yield tasks[task], task.result()
      except UserError as error:
        problems.append(str(error))
  if problems:
    raise Problems(f"{len(problems)} of {len(shards)} shards cannot be used", sorted(problems))


def _shards(path: str) -> list[str]:
  if path.endswith(".tar"):
    return [path]
  names = [name for name in files.listing(path) if name.endswith(".tar")] if files.is_folder(path) else []
  if not names:
    raise UserError(f"no .tar shards at {path}; only these have an index")
  return [f"{path.rstrip('/')}/{name}" for name in names]


def _index_beside(shard: str) -> int:
  return len(index_shard(shard, beside=True))


def index_shard(shard: str, *, beside: bool = False) -> np.ndarray:
  """Where the samples of a shard lie, uint32 [n, 4]: block and size of the image, block and size of the caption; these
  are 0 in a shard of pictures alone.

  Args:
    beside: leave the index beside the shard even in a bucket (and say so if that fails), for other machines.

  Raises:
    UserError: see TarSource.
  """
  size, changed = files.stamp(shard)
  folder, _, name = shard.rpartition("/")
  name = f"{name}.{size}-{changed}.npy"
  near = f"{folder or '.'}/.index/{name}"
  cached = _cache_dir() / f"{hashlib.sha1(shard.encode()).hexdigest()[:16]}-{name}"
  places = [cached] if files.is_remote(shard) else [Path(near), cached]
  if not beside:
    for place in places:
      with contextlib.suppress(OSError, ValueError, EOFError):  # a damaged index is made again
        return np.load(place, mmap_mode="r")
    with contextlib.suppress(UserError, ValueError, EOFError):
      if files.is_remote(shard):
        return _kept(np.load(io.BytesIO(files.read(near))), places)
  rows = _scan(shard)
  if beside:
    with files.reading(near):
      _save(near, rows)
    return rows
  return _kept(rows, places)


def _cache_dir() -> Path:
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blip3o_jax" / "index"


def _kept(rows: np.ndarray, places: list[Path]) -> np.ndarray:
  """`rows` mapped from the first of `places` that can be written, or in memory."""
  for place in places:
    with contextlib.suppress(OSError):
      _save(place, rows)
      return np.load(place, mmap_mode="r")
  return rows


def _save(path: str | Path, rows: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.save(buffer, rows)
  write_atomically(path, buffer.getvalue())


def _scan(shard: str) -> np.ndarray:
  _log.info("indexing %s", shard)
  return files.scan(shard, functools.partial(_read_headers, shard))


def _read_headers(shard: str, stream: BinaryIO) -> np.ndarray:
  pairs: dict[str, dict[str, tuple[int, int]]] = {}
  last, end = "the start", 0
  packed = stream.read(4)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
  if packed:
    raise UserError(f"shard {shard} is compressed; unpack it: only plain tars allow random access")
  stream.seek(0)
  try:
    with tarfile.open(fileobj=stream, mode="r:") as tar:
      for member in tar:
        last, end = member.name, member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if not member.isfile():
          continue
        folder, _, file = member.name.rpartition("/")
        stem, _, extension = file.rpartition(".")
        extension = extension.lower()
        kind = "image" if extension in IMAGE_EXTENSIONS else "text" if extension == "txt" else None
        if kind is None or stem[:1] in ("", "."):
          continue  # other members (.json, .cls) belong to other readers; a Mac's tar adds ._x.jpg, which is no picture
        pair = pairs.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if kind in pair:
          raise UserError(f"shard {shard} holds {member.name} twice (or two images of one key); make its keys unique")
        pair[kind] = (member.offset_data // _BLOCK, member.size)
    # The module takes a header that is cut off for the end; a whole tar ends in blocks of zeros.
    stream.seek(end)
    if stream.read(_BLOCK) != bytes(_BLOCK):
      raise tarfile.ReadError
  except tarfile.ReadError:
    raise UserError(f"shard {shard} is truncated or no tar, after member {last}; fetch it again") from None
  alone = not any("text" in pair for pair in pairs.values())
  for key, pair in pairs.items():
    if len(pair) < 2 and not alone:
      lacks = "caption .txt" if "image" in pair else "image"
      raise UserError(f"shard {shard}: {key} has no {lacks}; every sample needs an image and a .txt")
  rows = [[*pair["image"], *pair.get("text", (0, 0))] for pair in pairs.values()]
  rows = np.array(rows, np.int64).reshape(-1, 4)
  if rows.size and rows.max() >= 2**32:
    raise UserError(f"shard {shard} has members of more than 4 GiB, or lies beyond 2 TiB; split it")
  return rows.astype(np.uint32)
