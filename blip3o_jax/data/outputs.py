"""Files that commands leave behind: pictures, reports, scores."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image


def encode_png(picture: np.ndarray) -> bytes:
  """uint8 [H, W, 3] -> PNG."""
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(picture, np.uint8)).save(buffer, "PNG")
  return buffer.getvalue()


def write_atomically(path: str | Path, content: bytes) -> None:
  """The file is there whole or not at all; missing folders are made."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  temporary.write_bytes(content)
  os.replace(temporary, path)
