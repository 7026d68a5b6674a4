"""Files that commands leave behind: pictures, reports, scores. A path may be one of a bucket, gs://..."""

import io
import os

import numpy as np
from etils import epath
from PIL import Image

from blip3o_jax.data.files import is_remote


def encode_png(picture: np.ndarray) -> bytes:
  """uint8 [H, W, 3] -> PNG."""
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(picture, np.uint8)).save(buffer, "PNG")
  return buffer.getvalue()


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
  """The file is there whole or not at all; missing folders are made."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(os.fspath(path)):  # an object appears when it is complete
    path.write_bytes(content)
    return
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  temporary.write_bytes(content)
  os.replace(temporary, path)
