"""Patches, windows and positions on the host, against the image processor and the recordings of transformers."""

import numpy as np
import pytest
from helpers import load_golden
from PIL import Image

from blip3o_jax.data.vision import ImageProcessor, pad_rows, patch_numbers, rope_index, smart_resize
from blip3o_jax.errors import UserError

GRIDS = [[[1, 6, 10], [1, 8, 4]], [[1, 2, 2]], [[1, 8, 8]], [[1, 10, 14], [1, 4, 26]], [[3, 6, 4]]]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 37), (41, 300), (30, 31), (7, 9), (256, 180)])
@pytest.mark.parametrize("patch", [14, 8])
def test_processor_equals_transformers(height, width, patch):
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

  limits = {"min_pixels": 32 * 32, "max_pixels": 120 * 120}
  image = Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))
  theirs = Qwen2VLImageProcessorPil(patch_size=patch, **limits)(image)
  patches, grid = ImageProcessor(patch_size=patch, **limits)(image)
  assert patches.dtype == np.float32
  np.testing.assert_array_equal(grid, theirs["image_grid_thw"][0])
  np.testing.assert_array_equal(patches, theirs["pixel_values"])
  np.testing.assert_array_equal(ImageProcessor(patch_size=patch, **limits)(np.asarray(image))[0], patches)


def test_processor_from_reference():
  old = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5]}
  new = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "image_mean": [0.5, 0.5, 0.5]}
  assert ImageProcessor.from_reference(old) == ImageProcessor.from_reference(new)
  assert ImageProcessor.from_reference(new) == ImageProcessor(max_pixels=12845056, mean=(0.5, 0.5, 0.5))


def test_smart_resize():
  assert smart_resize(448, 448, 28, 3136, 10**6) == (448, 448)
  assert smart_resize(1000, 10, 28, 3136, 10**6)[1] == 28
  with pytest.raises(UserError, match="too long and thin"):
    smart_resize(2010, 10, 28, 3136, 10**6)


def window_order(grids, merge, window, patch):
  """transformers' get_vision_window_index, in numpy: (order of merge blocks, patches in each window)."""
  side, order, sizes, start = window // merge // patch, [], [], 0
  for t, h, w in grids:
    h, w = h // merge, w // merge
    index = np.arange(t * h * w).reshape(t, h, w)
    pad_h, pad_w = side - h % side, side - w % side
    index = np.pad(index, ((0, 0), (0, pad_h), (0, pad_w)), constant_values=-100)
    index = index.reshape(t, (h + pad_h) // side, side, (w + pad_w) // side, side).transpose(0, 1, 3, 2, 4)
    index = index.reshape(-1, side * side)
    sizes += [n for n in (index != -100).sum(-1) * merge**2 if n]
    order += (index[index != -100] + start).tolist()
    start += t * h * w
  return np.asarray(order), sizes


@pytest.mark.parametrize(("window", "patch"), [(56, 14), (112, 14), (32, 8)])
@pytest.mark.parametrize("grids", GRIDS)
def test_windows(grids, window, patch):
  numbers = patch_numbers(grids, window_size=window, patch_size=patch)
  windows = numbers["patch_window"].reshape(-1, 4)
  assert (windows == windows[:, :1]).all()
  order, sizes = window_order(grids, 2, window, patch)
  np.testing.assert_array_equal(np.argsort(windows[:, 0], kind="stable"), order)
  np.testing.assert_array_equal(np.unique(windows, return_counts=True)[1], sizes)
  frames = [h * w for t, h, w in grids for _ in range(t)]
  np.testing.assert_array_equal(numbers["patch_image"], np.repeat(np.arange(len(frames)), frames))


def test_positions_follow_the_merge_blocks():
  numbers = patch_numbers([[1, 2, 4]])
  want = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
  np.testing.assert_array_equal(numbers["patch_pos"], want)
  # A patch's own content says where it came from.
  pixels = np.zeros((2 * 14, 4 * 14, 3), np.float32)
  pixels += np.arange(2).repeat(14)[:, None, None] * 10 + np.arange(4).repeat(14)[None, :, None]
  patches, grid = ImageProcessor().patchify(pixels)
  np.testing.assert_array_equal(patches[:, 0], [10 * row + col for row, col in want])
  assert grid.tolist() == [1, 2, 4] and patches.shape == (8, 1176)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl_tied"])
@pytest.mark.parametrize("prefix", ["mm", "mmbatch"])
def test_rope_index_recording(name, prefix):
  recording = load_golden(name)
  io = {key.removeprefix(f"{prefix}:"): value for key, value in recording.io.items() if key.startswith(f"{prefix}:")}
  grid = recording.io["mm:image_grid_thw"]
  grid = grid[None] if prefix == "mm" else grid[:, None]
  mask = io["attention_mask"] > 0
  positions, delta = rope_index(io["input_ids"], mask, grid, image_token=recording.config["image_token_id"])
  np.testing.assert_array_equal(np.moveaxis(positions, 1, 0)[:, mask], io["position_ids"][:, mask])
  np.testing.assert_array_equal(delta[:, None], io["rope_deltas"])


def test_rope_index_of_text_and_of_rows_with_unequal_images():
  tokens = np.array([[5, 5, 5, 5, 0, 0], [9, 5, 9, 9, 5, 5]])
  grid = np.array([[[0, 0, 0], [0, 0, 0]], [[1, 2, 2], [1, 2, 4]]])
  positions, delta = rope_index(tokens, [[1, 1, 1, 1, 0, 0], [1] * 6], grid, image_token=9)
  np.testing.assert_array_equal(positions[0, :, :4], np.broadcast_to(np.arange(4), (3, 4)))
  np.testing.assert_array_equal(positions[1], [[0, 1, 2, 2, 4, 5], [0, 1, 2, 2, 4, 5], [0, 1, 2, 3, 4, 5]])
  np.testing.assert_array_equal(delta, [0, 0])


def test_rope_index_errors():
  with pytest.raises(UserError, match="row 0 has 2 image tokens but its 1 images need 1"):
    rope_index([[9, 9]], [[1, 1]], np.array([[[1, 2, 2]]]), image_token=9)
  with pytest.raises(UserError, match="interrupted"):
    rope_index([[9, 5, 9]], [[1, 1, 1]], np.array([[[1, 2, 4]]]), image_token=9)


def test_pad_rows():
  eight, none = np.ones((8, 1176)), np.zeros((0, 1176))
  rows = [(eight, [[1, 2, 4]]), (none, np.zeros((0, 3))), (eight, [[1, 2, 2]] * 2)]
  batch = pad_rows(rows, length=12)
  assert {key: value.shape for key, value in batch.items()} == {
    "patches": (3, 12, 1176),
    "patch_pos": (3, 12, 2),
    "patch_image": (3, 12),
    "patch_window": (3, 12),
    "grid_thw": (3, 2, 3),
  }
  np.testing.assert_array_equal(batch["patch_image"][2], [0] * 4 + [1] * 4 + [-1] * 4)
  np.testing.assert_array_equal(batch["patch_window"][1], [-1] * 12)
  np.testing.assert_array_equal(batch["grid_thw"][0], [[1, 2, 4], [0, 0, 0]])
  with pytest.raises(UserError, match="row 0 has 1 images with 8 patches; the batch takes 2 with 4"):
    pad_rows(rows, length=4)
  with pytest.raises(UserError, match="row 0 holds 7 patches"):
    pad_rows([(np.ones((7, 1176)), [[1, 2, 4]])], length=8)
