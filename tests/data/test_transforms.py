import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.benchmarks.data import picture
from blip3o_jax.data import transforms
from blip3o_jax.errors import UserError


def gradient(width, height):
  x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
  return Image.fromarray(np.stack([x, x, x], axis=-1).astype(np.uint8))


def test_crop_keeps_proportions_and_takes_the_middle():
  out = transforms.square(gradient(400, 200), 50)
  assert out.shape == (50, 50, 3) and out.dtype == np.uint8
  assert 60 <= out[25, 0, 0] <= 68 and 187 <= out[25, -1, 0] <= 195


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1021, 333), (97, 411), (449, 448), (30, 20), (500, 500)])
@pytest.mark.parametrize("side", [16, 448])
def test_what_is_cropped_away_bears_on_nothing(size, side):
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
  width, height = (int(side * length / min(size)) for length in size)
  left, top = round((width - side) / 2), round((height - side) / 2)
  want = noise.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
  off = np.abs(np.asarray(want).astype(int) - transforms.square(noise, side))
  assert off.max() <= 2 and (off > 0).mean() < 0.005  # in noise, the worst case
  want = noise.resize((side, side), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(transforms.square(noise, side, "squash"), np.asarray(want))


def test_what_is_cropped_away_is_one_level_in_a_photograph():
  photo = Image.open(io.BytesIO(picture(3)))
  assert photo.width != photo.height and min(photo.size) > 448
  size = tuple(int(448 * length / min(photo.size)) for length in photo.size)
  left, top = (round((length - 448) / 2) for length in size)
  want = photo.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 448, top + 448))
  off = np.abs(np.asarray(want).astype(int) - transforms.square(photo, 448))
  assert off.max() <= 1 and (off > 0).mean() < 5e-4


def test_squash_keeps_everything():
  out = transforms.square(gradient(400, 200), 50, "squash")
  assert out.shape == (50, 50, 3) and out[25, 0, 0] < 5 and out[25, -1, 0] > 250


@pytest.mark.parametrize("size", [(64, 64), (65, 301), (33, 32), (31, 97)])
def test_any_proportions(size):
  assert transforms.square(gradient(*size), 32).shape == (32, 32, 3)


def test_a_picture_of_the_right_size_is_untouched():
  image = gradient(64, 64)
  assert np.array_equal(transforms.square(image, 64), np.asarray(image))


def encoded(image, kind="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def palette_with_a_transparent_colour():
  image = Image.new("P", (4, 4), 1)
  image.putpalette([0, 0, 0, 200, 100, 50])
  return encoded(image, transparency=1)


@pytest.mark.parametrize(
  "content, want",
  [
    (encoded(Image.new("L", (4, 4), 7)), (7, 7, 7)),
    (encoded(Image.new("LA", (4, 4), (7, 0))), (7, 7, 7)),
    (encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0))), (10, 20, 30)),
    (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
    (palette_with_a_transparent_colour(), (200, 100, 50)),
    (encoded(Image.fromarray(np.full((4, 4), 300, np.uint16))), (255, 255, 255)),
    (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
  ],
  ids=["gray", "gray-alpha", "alpha", "bits", "palette", "16-bit", "cmyk"],
)
def test_every_mode_becomes_rgb_as_pil_does_it(content, want):
  image = transforms.decode(content)
  assert image.mode == "RGB" and image.getpixel((2, 2)) == want


def test_a_cmyk_jpeg():
  image = transforms.decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
  assert image.mode == "RGB" and np.abs(np.array(image.getpixel((8, 8))) - (255, 0, 0)).max() < 12


def test_pictures_are_turned_upright():
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
  image = transforms.decode(encoded(gradient(40, 20), "JPEG", exif=exif))
  column = np.asarray(image)[:, 10, 0].astype(int)
  assert image.size == (20, 40) and column[0] < 20 and column[-1] > 235


def test_decompression_bombs_are_refused_by_their_headers():
  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  def bomb(side):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")

  message = "b.png: more than 89 million pixels"
  with pytest.warns(Image.DecompressionBombWarning), pytest.raises(UserError, match=message):
    transforms.decode(bomb(10_000), "b.png")
  with pytest.raises(UserError, match=message):
    transforms.decode(bomb(60_000), "b.png")


def test_a_picture_cut_off_is_none():
  content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
  with pytest.raises(UserError, match="cut.jpg: not a readable image .image file is truncated"):
    transforms.decode(content[: len(content) // 2], "cut.jpg")


def test_errors():
  with pytest.raises(UserError, match="3000 x 10 is too long and thin"):
    transforms.square(gradient(3000, 10), 8)
  with pytest.raises(UserError, match="x.jpg: not an image"):
    transforms.decode(b"no picture", "x.jpg")
  with pytest.raises(UserError, match="resize mode"):
    transforms.square(gradient(8, 8), 4, "stretch")


# ---- what people hand over as a picture


def opened(image, **options):
  buffer = io.BytesIO()
  image.save(buffer, options.pop("format", "PNG"), **options)
  return np.asarray(transforms.open_picture(buffer, "x"))


def test_every_kind_of_picture_becomes_rgb():
  red = Image.new("RGB", (6, 4), (200, 30, 20))
  want = np.asarray(red)
  assert np.array_equal(opened(red.quantize(4)), want)  # palette
  assert np.abs(opened(red.convert("CMYK"), format="TIFF").astype(int) - want).max() <= 2
  deep = Image.fromarray(
    np.full((4, 6), 128 * 257, np.uint16)
  )  # 16 bits of gray: Pillow's own conversion clips to white
  assert (opened(deep) == 128).all()
  clear = Image.new("RGBA", (6, 4), (200, 30, 20, 0))
  clear.putpixel((1, 1), (200, 30, 20, 255))
  assert opened(clear)[1, 1].tolist() == [200, 30, 20] and (opened(clear)[0] == 255).all()  # transparent shows white
  assert np.array_equal(opened(red, format="GIF", save_all=True, append_images=[Image.new("RGB", (6, 4))]), want)
  turned = Image.Exif()
  turned[0x0112] = 6  # a camera held upright
  assert opened(red, exif=turned).shape == (6, 4, 3)
  assert opened(Image.new("L", (6, 4), 7)).tolist() == np.full((4, 6, 3), 7).tolist()


def test_pictures_that_cannot_be_read_are_told(tmp_path):
  def png(width, height, data):
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")

  cases = [
    (png(20000, 20000, b""), "x: more than 89 million pixels; shrink it first"),
    (png(40, 40, b"broken"), "x: not a readable image"),
    (b"", "x: not an image"),
    (b"<html>not found</html>", "x: not an image"),
  ]
  for content, words in cases:
    with pytest.raises(UserError, match=words) as error:
      transforms.open_picture(io.BytesIO(content), "x")
    assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="mode F, are neither 8 nor 16 bits"):
    transforms.open_picture(Image.fromarray(np.full((4, 6), 0.5, np.float32)))
  with pytest.raises(UserError, match="a picture is a dict; give an image"):
    transforms.open_picture({})
