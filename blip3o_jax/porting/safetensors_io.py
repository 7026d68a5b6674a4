"""Safetensors files: a lazy reader over one or many, and a streaming, atomic writer (floor 3).

Pickled weights (.bin, .pt) are refused: loading a pickle runs whatever code is in it.
"""

import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from blip3o_jax.errors import UserError

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
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Reader(Mapping[str, np.ndarray]):
  """{key: array} over safetensors files. Files are memory-mapped; `reader[key]` reads that array alone.

  bfloat16 comes as ml_dtypes.bfloat16. `shape` and `dtype` read no data.
  """

  def __init__(self, handles: Mapping[str, Any]):
    self._handles = dict(handles)  # key -> open file

  def __getitem__(self, key: str) -> np.ndarray:
    return self._handles[key].get_tensor(key)

  def __iter__(self) -> Iterator[str]:
    return iter(self._handles)

  def __len__(self) -> int:
    return len(self._handles)

  def shape(self, key: str) -> tuple[int, ...]:
    return tuple(self._handles[key].get_slice(key).get_shape())

  def dtype(self, key: str) -> np.dtype:
    return np.dtype(_DTYPES[self._handles[key].get_slice(key).get_dtype()])


class Renamed(Mapping[str, np.ndarray]):
  """Some keys of a reader under other names: `names` is {new key: key in `reader`}."""

  def __init__(self, reader: Mapping[str, np.ndarray], names: Mapping[str, str]):
    self._reader, self._names = reader, dict(names)

  def __getitem__(self, key: str) -> np.ndarray:
    return self._reader[self._names[key]]

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)

  def shape(self, key: str) -> tuple[int, ...]:
    name = self._names[key]
    return tuple(self._reader.shape(name) if hasattr(self._reader, "shape") else self._reader[name].shape)


def open_weights(path: os.PathLike | str) -> Reader:
  """Open a .safetensors file, a .safetensors.index.json, or a directory with either.

  Raises:
    UserError: nothing there, pickled weights, a corrupt or truncated file, an index that points outside its directory.
  """
  path = epath.Path(path)
  if path.name.endswith(_PICKLES):
    raise UserError(f"{path}: pickled weights are refused because loading them runs code; convert to .safetensors")
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
    pickled = [f.name for f in path.iterdir() if f.name.endswith(_PICKLES)]
    if pickled:
      raise UserError(
        f"{path}: only pickled weights ({pickled[0]}), refused because loading them runs code; convert to .safetensors"
      )
    raise UserError(f"{path}: no .safetensors file here")
  return _open_files(files)


def _open_index(index: epath.Path) -> Reader:
  try:
    weight_map = json.loads(index.read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f"{index}: not a safetensors index ({type(error).__name__}); download it again") from error
  handles = {}
  for name in files:
    place = PurePosixPath(str(name).replace("\\", "/"))
    if not isinstance(name, str) or place.is_absolute() or ".." in place.parts:
      raise UserError(f"{index}: names a file outside its directory ({name!r}); refused")
    handles[name] = _open(index.parent / name)
  held = {name: set(handle.keys()) for name, handle in handles.items()}
  if absent := [key for key, name in weight_map.items() if key not in held[name]]:
    raise UserError(f"{index}: {len(absent)} keys are not in the files it names, e.g. {absent[0]}; download it again")
  return Reader({key: handles[name] for key, name in weight_map.items()})


def _open_files(files: Iterable[epath.Path]) -> Reader:
  handles: dict[str, Any] = {}
  for file in files:
    handle = _open(file)
    if twice := [key for key in handle.keys() if key in handles]:
      raise UserError(f"{file}: {twice[0]} is also in another file of this directory; keep one of them")
    handles.update(dict.fromkeys(handle.keys(), handle))
  return Reader(handles)


def _open(file: epath.Path) -> Any:
  if not file.name.endswith(".safetensors"):
    raise UserError(f"{file}: not a .safetensors file; other formats are not read")
  if not file.exists():
    raise UserError(f"{file}: no such file; the download is incomplete")
  local = os.fspath(file)
  copy = None
  if "://" in local:  # mapping needs a local file
    copy = tempfile.NamedTemporaryFile(suffix=".safetensors")
    file.copy(copy.name, overwrite=True)
    local = copy.name
  try:
    handle = safe_open(local, framework="numpy")
    if unknown := {handle.get_slice(k).get_dtype() for k in handle.keys()} - set(_DTYPES):
      raise UserError(f"{file}: dtypes {', '.join(sorted(unknown))} are not supported")
    return handle
  except (SafetensorError, OSError) as error:
    raise UserError(f"{file}: corrupt or truncated ({error}); download or copy it again") from error
  finally:
    if copy is not None:
      copy.close()


def write(
  path: os.PathLike | str,
  specs: Mapping[str, Any],
  arrays: Iterable[tuple[str, np.ndarray]],
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
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      file.write(struct.pack("<Q", len(text)) + text)
      expected = iter(specs.items())
      for key, array in arrays:
        name, spec = next(expected, (None, None))
        if key != name or array.shape != tuple(spec.shape) or array.dtype != spec.dtype:
          raise ValueError(f"{key} {array.shape} {array.dtype} where {name} {spec} was announced")
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
      if (left := next(expected, None)) is not None:
        raise ValueError(f"{left[0]} was announced but not given")
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f"{path}: cannot write ({error.strerror or error})") from error
  finally:
    temporary.unlink(missing_ok=True)
