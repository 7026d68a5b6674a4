"""Files that commands leave behind: pictures, reports, scores. A path may be one of a bucket, gs://..."""

import contextlib
import io
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from blip3o_jax.data.files import is_remote
from blip3o_jax.errors import UserError


def encode_png(picture: np.ndarray, facts: Mapping[str, str] | None = None) -> bytes:
  """uint8 [H, W, 3] -> PNG, `facts` as its text chunks (any reader shows them; Pillow: `Image.open(file).text`)."""
  buffer, info = io.BytesIO(), PngInfo()
  for key, value in (facts or {}).items():
    info.add_itxt(key, value)
  Image.fromarray(np.asarray(picture, np.uint8)).save(buffer, "PNG", pnginfo=info)
  return buffer.getvalue()


def square_grid(pictures: Sequence[np.ndarray]) -> np.ndarray:
  """uint8 [H, W, 3] each -> one picture of rows and columns as equal as can be, without gaps; what is left is white."""
  columns = int(np.ceil(np.sqrt(len(pictures))))
  blank = np.full_like(pictures[0], 255)
  filled = [*pictures, *[blank] * (-len(pictures) % columns)]
  rows = [np.concatenate(filled[i : i + columns], axis=1) for i in range(0, len(filled), columns)]
  return np.concatenate(rows)


def write_atomically(path: str | os.PathLike, content: bytes | Iterable[bytes]) -> None:
  """The file is there whole or not at all; missing folders are made. Pieces are written one after another."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(path):  # an object appears when it is complete
    path.write_bytes(content if isinstance(content, bytes) else b"".join(content))
    return
  with replacing(path) as temporary, open(temporary, "wb") as file:
    file.writelines([content] if isinstance(content, bytes) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """The name of a file that takes the place of `path`, on a disk, if the block ends well, and vanishes if not."""
  # Not by process number: hosts that share a disk may count alike.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
  """What the facts of two JSON files differ in, in words by key: {"seed": "seed was 0, is 1"}."""
  old, new = json.loads(json.dumps([old, new]))  # tuples become lists, as in a file
  words = lambda key: f"{key} was {old.get(key, 'absent')!r:.200}, is {new.get(key, 'absent')!r:.200}"
  return {key: words(key) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}


def writable_folder(path: str | Path) -> Path:
  """The folder, made where it is missing. Raises UserError (or OSError) before any work is done for it."""
  if ":/" in str(path):  # one slash: what pathlib leaves of two
    raise UserError(f"{path}: this needs a file system; mount the bucket and give the folder")
  path = Path(path)
  path.mkdir(parents=True, exist_ok=True)
  if not os.access(path, os.W_OK):
    raise UserError(f"{path} cannot be written; give another folder")
  return path


def remove_stale(paths: Iterable[Path]) -> None:
  """Remove what a killed process left half-written beside `paths`, and nothing else."""
  folders: dict[Path, list[str]] = {}
  for path in paths:
    if path.parent not in folders:
      found = os.listdir(path.parent) if path.parent.is_dir() else []
      folders[path.parent] = [name for name in found if name.endswith(".tmp")]
    for name in folders[path.parent]:
      if name.startswith(f".{path.name}."):
        (path.parent / name).unlink(missing_ok=True)
