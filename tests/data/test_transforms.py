import numpy as np
import pytest
from PIL import Image

from blip3o_jax.data import transforms
from blip3o_jax.errors import UserError


def gradient(width, height):
  x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
  return Image.fromarray(np.stack([x, x, x], axis=-1).astype(np.uint8))


def test_crop_keeps_proportions_and_takes_the_middle():
  out = transforms.square(gradient(400, 200), 50)
  assert out.shape == (50, 50, 3) and out.dtype == np.uint8
  assert 60 <= out[25, 0, 0] <= 68 and 187 <= out[25, -1, 0] <= 195


def test_squash_keeps_everything():
  out = transforms.square(gradient(400, 200), 50, "squash")
  assert out.shape == (50, 50, 3) and out[25, 0, 0] < 5 and out[25, -1, 0] > 250


@pytest.mark.parametrize("size", [(64, 64), (65, 301), (33, 32), (31, 97)])
def test_any_proportions(size):
  assert transforms.square(gradient(*size), 32).shape == (32, 32, 3)


def test_a_picture_of_the_right_size_is_untouched():
  image = gradient(64, 64)
  assert np.array_equal(transforms.square(image, 64), np.asarray(image))


def test_normalize():
  out = transforms.normalize(np.array([[[0, 128, 255]]], np.uint8))
  want = (np.array([0, 128 / 255, 1]) - transforms.CLIP_MEAN) / transforms.CLIP_STD
  np.testing.assert_allclose(out[0, 0], want, rtol=1e-5)


def test_errors():
  with pytest.raises(UserError, match="x.jpg: not an image"):
    transforms.decode(b"no picture", "x.jpg")
  with pytest.raises(UserError, match="resize mode"):
    transforms.square(gradient(8, 8), 4, "stretch")
