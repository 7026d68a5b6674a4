"""Pictures on their way to a language model: both towers through one face, SigLIP against transformers' processor."""

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.data.pictures import QwenPictures, SiglipPictures
from blip3o_jax.data.vision import ImageProcessor
from blip3o_jax.errors import UserError

SIGLIP = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}, "resample": 2}


def siglip():
  return SiglipPictures.from_reference(SIGLIP, size=32, count=4, image_token=9)


@pytest.fixture(scope="module")
def picture():
  return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8))


def test_siglip_sees_what_its_processor_gives(picture):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.SiglipImageProcessorPil(**SIGLIP)(picture, return_tensors="np")["pixel_values"][0]
  ours = siglip().read(picture)
  assert ours.shape == (32, 32, 3) and ours.dtype == np.uint8
  np.testing.assert_allclose(ours.astype(np.float32) / 127.5 - 1, theirs.transpose(1, 2, 0), atol=1e-6)
  np.testing.assert_array_equal(ours, siglip().read(np.asarray(picture)))
  silent = {key: value for key, value in SIGLIP.items() if key != "resample"}
  assert SiglipPictures.from_reference(silent, size=32, count=4, image_token=9) == siglip()
  cubic = SiglipPictures.from_reference(SIGLIP | {"resample": 3}, size=32, count=4, image_token=9)
  assert (cubic.read(picture) != ours).any()


def test_siglip_rows_and_positions(picture):
  pictures = siglip()
  seen = pictures.read(picture)
  assert pictures.place(seen) == "[IMG]<image><image><image><image>[/IMG]"
  arrays = pictures.rows([[], [seen, 255 - seen], [seen]])
  assert arrays["images"].shape == (3, 2, 32, 32, 3) and arrays["images"].dtype == np.uint8
  np.testing.assert_array_equal(arrays["images"][1], [seen, 255 - seen])
  assert not arrays["images"][0].any() and not arrays["images"][2, 1].any()
  assert pictures.rows([[]], images=1, tokens=64)["images"].shape == (1, 1, 32, 32, 3)
  tokens, mask = np.asarray([[0, 5, 9, 9, 9, 9], [1, 9, 9, 9, 9, 0]]), np.ones((2, 6), bool)
  mask[0, 0] = mask[1, 5] = False
  row = {"tokens": tokens[0], "images": arrays["images"][1]}
  np.testing.assert_array_equal(pictures.shown(row), seen)
  assert pictures.shown(row | {"tokens": tokens[0] * 0}) is None
  positions = pictures.positions(tokens, mask, arrays)
  assert positions.dtype == np.int32 and positions.shape == (2, 3, 6)
  assert (positions == [[[0, 0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4, 0]]]).all()


def test_siglip_refuses_what_would_go_wrong_silently():
  with pytest.raises(UserError, match="a row has 3 image tokens, 4 a picture"):
    siglip().positions(np.full((1, 3), 9), np.ones((1, 3), bool), {})
  for change, words in [({"image_std": [0.5, 0.5, 0.4]}, "other than 0.5"), ({"size": {"height": 16}}, "of 32")]:
    with pytest.raises(UserError, match=words):
      SiglipPictures.from_reference(SIGLIP | change, size=32, count=4, image_token=9)


def test_qwen_rows_and_places(picture):
  pictures = QwenPictures(ImageProcessor(patch_size=8), image_token=9, window_size=32)
  first, second = pictures.read(picture), pictures.read(Image.new("RGB", (64, 64)))
  tokens = lambda seen: len(seen[0]) // 4
  assert pictures.place(second) == f"<|vision_start|>{'<|image_pad|>' * tokens(second)}<|vision_end|>"
  arrays = pictures.rows([[first, second], []])
  assert arrays["patches"].shape == (2, 4 * (tokens(first) + tokens(second)), 384)
  assert arrays["grid_thw"][0].tolist() == [first[1].tolist(), second[1].tolist()] and not arrays["grid_thw"][1].any()
  assert pictures.rows([[]], tokens=4, images=1)["patches"].shape == (1, 16, 384)
  shown = pictures.shown({key: value[0] for key, value in arrays.items()})
  assert shown.shape == (8 * first[1][1], 8 * first[1][2], 3) and shown.std() > 0
  assert pictures.shown({key: value[1] for key, value in arrays.items()}) is None
  row = np.asarray([[7] + [9] * tokens(second) + [7]])
  positions = pictures.positions(row, np.ones_like(row, bool), pictures.rows([[second]]))
  assert positions[0, :, 0].tolist() == [0, 0, 0] and positions[0, :, -1].tolist() == [1 + second[1][1] // 2] * 3
