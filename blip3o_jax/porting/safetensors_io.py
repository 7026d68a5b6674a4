"""Safetensors files: a lazy reader over one or many, and a streaming, atomic writer (floor 3).

Pickled weights (.bin, .pt) are refused: loading a pickle runs whatever code is in it.
"""

import dataclasses
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from blip3o_jax.data.outputs import replacing
from blip3o_jax.errors import Problems, UserError

_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PIECE = 1 << 22  # bytes, small enough for a cache
_MAX_HEADER = 100_000_000  # bytes, the limit of the format


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """Where one array lies: `count` bytes of `file` from `offset` on."""

  file: epath.Path
  offset: int
  count: int
  dtype: np.dtype
  shape: tuple[int, ...]


class Reader(Mapping[str, np.ndarray]):
  """{key: array} over safetensors files; `reader[key]` reads that array alone, `shape` and `dtype` read nothing.

  Files are read, not mapped: mapped pages count as resident memory, and a bucket cannot be mapped. bfloat16 comes as
  ml_dtypes.bfloat16.

  Attributes:
    bytes_read: of arrays, so far.
  """

  def __init__(self, tensors: Mapping[str, _Tensor]):
    self._tensors = dict(tensors)
    self._buffers: list[memoryview] = []
    self.bytes_read = 0

  def __getitem__(self, key: str) -> np.ndarray:
    tensor = self._tensors[key]
    buffer = np.empty(tensor.count, np.uint8)
    for _ in self._read_into(tensor, itertools.repeat(memoryview(buffer))):
      pass
    return buffer.view(tensor.dtype).reshape(tensor.shape)

  def stream(self, key: str) -> "Stream":
    """The array's bytes in pieces. A piece is overwritten when the second after it is asked for, of this array or of
    the next: one stream at a time."""
    tensor = self._tensors[key]
    self._buffers = self._buffers or [memoryview(bytearray(_PIECE)) for _ in range(2)]
    return Stream(tensor.shape, tensor.dtype, self._read_into(tensor, itertools.cycle(self._buffers)))

  def _read_into(self, tensor: _Tensor, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
    """Fill one buffer after another until the array is read (one as large as the array, or smaller ones)."""
    left = tensor.count
    with tensor.file.open("rb") as file:
      file.seek(tensor.offset)
      while left:
        piece, done = next(buffers)[:left], 0
        while done < len(piece):  # one call reads at most 2 GiB
          if not (got := file.readinto(piece[done:])):
            raise UserError(f"{tensor.file}: became shorter while it was read; copy it again")
          done += got
        left -= done
        self.bytes_read += done
        yield piece

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __contains__(self, key: object) -> bool:  # that of Mapping would read the array
    return key in self._tensors

  def __len__(self) -> int:
    return len(self._tensors)

  def shape(self, key: str) -> tuple[int, ...]:
    return self._tensors[key].shape

  def dtype(self, key: str) -> np.dtype:
    return self._tensors[key].dtype


@dataclasses.dataclass(frozen=True)
class Stream:
  """An array that is read piece by piece: its C-order bytes."""

  shape: tuple[int, ...]
  dtype: np.dtype
  pieces: Iterator[memoryview]


Stored = np.ndarray | Stream


def pieces(array: Stored) -> Iterator[memoryview]:
  """The bytes of an array, which is in memory and contiguous or comes in pieces."""
  return array.pieces if isinstance(array, Stream) else iter([array.reshape(-1).view(np.uint8).data])


class Renamed(Mapping[str, np.ndarray]):
  """Some keys of a reader under other names: `names` is {new key: key in `reader`}."""

  def __init__(self, reader: Mapping[str, np.ndarray], names: Mapping[str, str]):
    self._reader, self._names = reader, dict(names)

  def __getitem__(self, key: str) -> np.ndarray:
    return self._reader[self._names[key]]

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __contains__(self, key: object) -> bool:
    return key in self._names

  def __len__(self) -> int:
    return len(self._names)

  def stream(self, key: str) -> Stored:
    """As that of `Reader`."""
    return stream(self._reader, self._names[key])

  def shape(self, key: str) -> tuple[int, ...]:
    return spec(self._reader, self._names[key]).shape

  def dtype(self, key: str) -> np.dtype:
    return spec(self._reader, self._names[key]).dtype


@dataclasses.dataclass(frozen=True)
class Spec:
  """What an array will be."""

  shape: tuple[int, ...]
  dtype: np.dtype


def spec(reader: Mapping[str, Any], key: str) -> Spec:
  """Shape and dtype of an array of a reader (which reads nothing) or of a plain dict."""
  if hasattr(reader, "shape"):
    return Spec(tuple(reader.shape(key)), np.dtype(reader.dtype(key)))
  return Spec(tuple(reader[key].shape), np.dtype(reader[key].dtype))


def stream(reader: Mapping[str, Any], key: str) -> Stored:
  """An array of a reader, in pieces where the reader can give it so."""
  return reader.stream(key) if hasattr(reader, "stream") else np.asarray(reader[key])


def open_weights(path: os.PathLike | str) -> Reader:
  """Open a .safetensors file, a .safetensors.index.json, or a directory with either.

  Raises:
    UserError: nothing there, pickled weights, corrupt or truncated files, keys that are there twice, an index that
      points outside its directory: all of them in one message.
  """
  path = epath.Path(path)
  if path.name.endswith(PICKLES):
    raise UserError(_pickled(path))
  if not path.exists():
    raise UserError(f"{path}: no such file or directory; give a .safetensors file or a directory that holds one")
  if not path.is_dir():
    return _open_index(path) if path.name.endswith(".json") else _open_files([path])
  indices = sorted(path.glob("*.safetensors.index.json"))
  if len(indices) > 1:
    raise UserError(f"{path}: {', '.join(i.name for i in indices)}: more than one index; name the one to read")
  if indices:
    return _open_index(indices[0])
  files = sorted(path.glob("*.safetensors"))
  if not files:
    if pickled := sorted(f for f in path.iterdir() if f.name.endswith(PICKLES)):
      raise UserError(_pickled(pickled[0]))
    raise UserError(f"{path}: no .safetensors file here")
  return _open_files(files)


def _pickled(path: epath.Path) -> str:
  load = f"torch.load({path.name!r}, map_location='cpu', weights_only=True)"
  return (
    f"{path}: pickled weights are refused, because loading them runs code. Where torch is installed, "
    f'python -c "import torch, safetensors.torch as s; s.save_file({load}, {path.stem + ".safetensors"!r})" '
    "makes a file of them that is read here"
  )


def _open_index(index: epath.Path) -> Reader:
  problems: list[str] = []
  try:
    weight_map = json.loads(index.read_text(), object_pairs_hook=lambda pairs: _unique(pairs, problems))["weight_map"]
    files = sorted(set(map(str, weight_map.values())))
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f"{index}: not a safetensors index ({type(error).__name__}); download it again") from error
  problems = [f"{index}: {problem}" for problem in problems]
  tensors: dict[str, dict[str, _Tensor]] = {}
  for name in files:
    place = PurePosixPath(name.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or name not in weight_map.values():
      problems.append(f"{index}: names a file outside its directory ({name!r}); refused")
    else:
      tensors[name] = _read_header(index.parent / name, problems)
  absent = [key for key, name in weight_map.items() if name in tensors and tensors[name] and key not in tensors[name]]
  problems += [f"{key}: expected in {weight_map[key]} (says {index.name}), found nothing" for key in absent]
  tell(problems, f"{index.parent}")
  return Reader({key: tensors[name][key] for key, name in weight_map.items()})


def _open_files(files: Iterable[epath.Path]) -> Reader:
  tensors: dict[str, _Tensor] = {}
  problems: list[str] = []
  for file in files:
    for key, tensor in _read_header(file, problems).items():
      if tensors.setdefault(key, tensor) is not tensor:
        problems.append(f"{file}: {key} is also in {tensors[key].file.name}; keep one of them")
  tell(problems, "weights")
  return Reader(tensors)


def _unique(pairs: list[tuple[str, Any]], problems: list[str]) -> dict[str, Any]:
  """A JSON object, which may name a key twice without json minding."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    problems += [f"{name}: is named twice" for name in found if names.count(name) > 1]
  return found


def _read_header(file: epath.Path, problems: list[str]) -> dict[str, _Tensor]:
  """What a file holds (huggingface/safetensors, "Format"): u64 length of a JSON header, the header, the arrays.

  Every byte behind the header must belong to exactly one array. What is wrong goes to `problems`.
  """
  if not file.name.endswith(".safetensors"):
    problems.append(f"{file}: not a .safetensors file; other formats are not read")
    return {}
  if not file.exists():
    problems.append(f"{file}: no such file; the download is incomplete")
    return {}
  wrong: list[str] = []
  tensors: dict[str, _Tensor] = {}
  try:
    size = file.stat().length
    with file.open("rb") as content:
      (length,) = struct.unpack("<Q", content.read(8))
      if length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"its header would be {length} bytes, the file has {size}")
      header = json.loads(content.read(length), object_pairs_hook=lambda pairs: _unique(pairs, wrong))
    start, end = 8 + length, 8 + length
    entries = [(key, entry) for key, entry in header.items() if key != "__metadata__"]
    for key, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
      if entry["dtype"] not in _DTYPES:
        wrong.append(f"{key}: dtype {entry['dtype']} is not supported")
        continue
      dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(map(int, entry["shape"]))
      first, last = (start + int(offset) for offset in entry["data_offsets"])
      count = dtype.itemsize * math.prod(shape)
      if min(shape, default=0) < 0 or first != end or last - first != count:
        raise ValueError(f"{key}: {entry['dtype']} {list(shape)} does not lie at {entry['data_offsets']}")
      tensors[key], end = _Tensor(file, first, count, dtype, shape), last
    if not wrong and end != size:
      raise ValueError(f"its arrays end at byte {end}, the file at {size}")
  except (ValueError, KeyError, TypeError, AttributeError, struct.error, OSError) as error:
    wrong.append(f"corrupt or truncated ({' '.join(str(error).split())[:120]}); download or copy it again")
  problems += [f"{file}: {problem}" for problem in wrong]
  return tensors


def tell(problems: Sequence[str], head: str) -> None:
  """Raise one error that lists every problem, if there is any."""
  if problems := list(dict.fromkeys(problems)):
    raise Problems(head, problems)


def write(
  path: os.PathLike | str,
  specs: Mapping[str, Any],
  arrays: Iterable[tuple[str, Stored]],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Write one safetensors file, holding one array at a time; `path` appears complete or not at all.

  Args:
    specs: {key: anything with .shape and .dtype}, in the order in which `arrays` gives them.
    arrays: (key, array) pairs of exactly these shapes and dtypes.

  Raises:
    UserError: a dtype that the format lacks, no space.
  """
  path, offset, header = Path(path), 0, {}
  if metadata:
    header["__metadata__"] = dict(metadata)
  for key, spec in specs.items():
    dtype = np.dtype(spec.dtype)
    if dtype not in _NAMES:
      raise UserError(f"{key}: safetensors has no dtype {dtype}; cast it first")
    size = dtype.itemsize * int(np.prod(spec.shape, dtype=np.int64))
    header[key] = {"dtype": _NAMES[dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + size]}
    offset += size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the data starts on a multiple of eight
  try:
    with replacing(path) as temporary, open(temporary, "wb") as file:
      if hasattr(os, "posix_fallocate"):  # a full disk shows at once; the write took half as long
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + offset)
      file.write(struct.pack("<Q", len(text)) + text)
      expected = iter(specs.items())
      for key, array in arrays:
        name, spec = next(expected, (None, None))
        if key != name or array.shape != tuple(spec.shape) or array.dtype != spec.dtype:
          raise ValueError(f"{key} {array.shape} {array.dtype} where {name} {spec} was announced")
        for piece in pieces(array):
          file.write(piece)
      if (left := next(expected, None)) is not None:
        raise ValueError(f"{left[0]} was announced but not given")
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise UserError(f"{path}: cannot write ({error.strerror or error})") from error
