"""Pictures: decoding, and the release's two ways to a square (spec 5.4). The model normalises them, on the device."""

import io
import os
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from blip3o_jax.errors import UserError

MAX_PIXELS = 89_478_485  # where PIL begins to suspect a decompression bomb: 256 MiB of RGB
MODES = ("crop", "squash")  # ways to a square, see `square`
MAX_RATIO = 200  # of the sides; the longer one is resized as a whole before it is cropped


def decode(content: bytes, name: str = "picture") -> Image.Image:
  """A picture of a data set, RGB and upright, as the release's training makes it.

  Its shards come through `datasets`, which turns a picture as its EXIF orientation says, and then through Pillow's
  convert("RGB"), whatever the mode: transparency is dropped, 16 bits are clipped to 8, CMYK knows no profile.

  Raises:
    UserError: naming the picture, when it cannot be read, is cut off, or has more than MAX_PIXELS.
  """
  return _opened(io.BytesIO(content), name, _as_trained)


def _as_trained(image: Image.Image) -> Image.Image:
  image.load()
  if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose and convert copy what is right already
    image = ImageOps.exif_transpose(image)
  return image if image.mode == "RGB" else image.convert("RGB")


def open_picture(picture: Image.Image | np.ndarray | str | os.PathLike | io.IOBase, name: str = "") -> Image.Image:
  """An RGB image of an image, of an array uint8 [H, W, 3], of a path, or of an open file; of an animation the first.

  Raises:
    UserError: naming the picture, if it cannot be read.
  """
  if isinstance(picture, np.ndarray):
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
      raise UserError(f"a picture is {picture.dtype} {list(picture.shape)}; give uint8 [height, width, 3]")
    return Image.fromarray(picture)
  if isinstance(picture, Image.Image):
    return _rgb(picture)
  if not isinstance(picture, str | os.PathLike | io.IOBase):
    raise UserError(f"a picture is a {type(picture).__name__}; give an image, an array or a path")
  return _opened(picture, name or str(picture), _rgb)


def _opened(picture: str | os.PathLike | io.IOBase, name: str, convert: Callable) -> Image.Image:
  try:
    with Image.open(picture) as file:  # reads the header alone
      if file.width * file.height > MAX_PIXELS:
        raise Image.DecompressionBombError
      return convert(file)
  except FileNotFoundError:
    raise UserError(f"{name}: no such image") from None
  except Image.DecompressionBombError:
    raise UserError(f"{name}: more than {MAX_PIXELS // 10**6} million pixels; shrink it first") from None
  except UnidentifiedImageError:
    raise UserError(f"{name}: not an image that Pillow knows") from None
  except Exception as error:  # Pillow's plugins raise whatever the bytes lead them to
    raise UserError(f"{name}: not a readable image ({error})") from None


def _rgb(image: Image.Image) -> Image.Image:
  """Upright; 16 bits are scaled, not clipped as Pillow does; what is transparent shows white, as Qwen's tools do."""
  image = ImageOps.exif_transpose(image)
  if image.mode[0] in "IF":
    levels = np.asarray(image)
    if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() > 65535:
      raise UserError(f"its levels, of mode {image.mode}, are neither 8 nor 16 bits")
    image = Image.fromarray(np.round(levels / 257).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert("RGB")


def square(image: Image.Image, size: int, mode: str = "crop") -> np.ndarray:
  """uint8 [size, size, 3].

  mode "crop": shortest side to `size` (bicubic, antialiased), then the centre, as the release trains; "squash": the
  aspect ratio is lost, as its inference pipeline does.

  Raises:
    UserError: an unknown mode, or one side more than MAX_RATIO times the other.
  """
  if mode not in MODES:
    raise UserError(f"resize mode {mode!r} is unknown; choose {' or '.join(MODES)}")
  width, height = image.size
  if max(image.size) > MAX_RATIO * min(image.size):
    raise UserError(f"a picture of {image.width} x {image.height} is too long and thin: crop it below 1 : {MAX_RATIO}")
  if mode == "squash":
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
  # The longer side is truncated and the crop offset rounded, as torchvision does.
  short = min(width, height)
  long = tuple(int(size * side / short) for side in image.size)
  corner = tuple(round((side - size) / 2) for side in long)
  crop = (*corner, *(place + size for place in corner))
  if long == image.size:
    return np.asarray(image.crop(crop))
  # What the crop would cut off is not computed: the same filter at the same places, a quarter faster. Pillow holds the
  # corners in float32, so that of 20,000 values about one is rounded to the next level.
  box = [min(side, side * place / whole) for place, side, whole in zip(crop, image.size * 2, long * 2, strict=True)]
  return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
