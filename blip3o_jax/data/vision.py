"""Pictures for Qwen2.5-VL, on the host: pixels -> patches, and the numbers that say where each patch and token lies.

Source of the semantics: transformers, Qwen2VLImageProcessor, get_vision_window_index and get_rope_index.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
  """The nearest (height, width) that are multiples of `factor` with an area in min_pixels..max_pixels.

  Raises:
    UserError: one side is more than 200 times the other.
  """
  if max(height, width) > 200 * min(height, width):
    raise UserError(f"an image of {width} x {height} is too long and thin: crop it to an aspect ratio below 200")
  h, w = round(height / factor) * factor, round(width / factor) * factor
  if h * w > max_pixels:
    beta = math.sqrt(height * width / max_pixels)
    h = max(factor, math.floor(height / beta / factor) * factor)
    w = max(factor, math.floor(width / beta / factor) * factor)
  elif h * w < min_pixels:
    beta = math.sqrt(min_pixels / (height * width))
    h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
  return h, w


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
  """The arithmetic of Qwen2VLImageProcessor for one picture; the defaults are its own."""

  patch_size: int = 14
  merge_size: int = 2
  temporal_patch_size: int = 2
  min_pixels: int = 56 * 56
  max_pixels: int = 28 * 28 * 1280
  mean: tuple[float, ...] = CLIP_MEAN
  std: tuple[float, ...] = CLIP_STD

  @classmethod
  def from_reference(cls, config: Mapping[str, Any]) -> "ImageProcessor":
    """From a preprocessor_config.json, with its limits as `min_pixels`/`max_pixels` or as `size`."""
    size = config.get("size") or {}
    fields = {
      "min_pixels": config.get("min_pixels") or size.get("shortest_edge"),
      "max_pixels": config.get("max_pixels") or size.get("longest_edge"),
      "mean": tuple(config["image_mean"]) if "image_mean" in config else None,
      "std": tuple(config["image_std"]) if "image_std" in config else None,
    } | {name: config.get(name) for name in ("patch_size", "merge_size", "temporal_patch_size")}
    return cls(**{name: value for name, value in fields.items() if value is not None})

  def __call__(self, image: Image.Image | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One picture -> (patches float32 [P, 3 * temporal * patch^2], grid_thw int32 [3] = (1, rows, columns)).

    Args:
      image: a PIL image, or uint8 [H, W, 3].
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image = image.convert("RGB")
    h, w = smart_resize(image.height, image.width, self.patch_size * self.merge_size, self.min_pixels, self.max_pixels)
    pixels = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
    return self.patchify(self.normalize(pixels))

  def normalize(self, pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32: the release rescales in float64, rounds to float32, then takes mean and deviation."""
    pixels = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

  def patchify(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [H, W, 3], sides a multiple of patch * merge -> as __call__. A still picture fills every time step."""
    h, w, c = pixels.shape
    p, m, t = self.patch_size, self.merge_size, self.temporal_patch_size
    x = pixels.reshape(h // p // m, m, p, w // p // m, m, p, c)
    x = x.transpose(0, 3, 1, 4, 6, 2, 5)  # block row, block column, row, column, channel, y, x
    x = np.repeat(x[:, :, :, :, :, None], t, axis=5)
    return x.reshape(-1, c * t * p * p), np.asarray([1, h // p, w // p], np.int32)

  def picture(self, patches: np.ndarray, patch_pos: np.ndarray) -> np.ndarray:
    """The picture uint8 [H, W, 3] that these patches [P, 3 * temporal * patch^2] show: patchify and normalize undone.

    Args:
      patch_pos: int [P, 2], row and column of each, see patch_numbers.
    """
    p = self.patch_size
    tiles = patches.reshape(len(patches), 3, self.temporal_patch_size, p, p)[:, :, 0].transpose(0, 2, 3, 1)
    rows, columns = patch_pos.max(axis=0) + 1
    canvas = np.zeros((rows, columns, p, p, 3), np.float32)
    canvas[tuple(patch_pos.T)] = tiles * np.asarray(self.std) + np.asarray(self.mean)
    pixels = canvas.swapaxes(1, 2).reshape(rows * p, columns * p, 3)
    return np.clip(np.round(pixels * 255), 0, 255).astype(np.uint8)


def patch_numbers(
  grid_thw: Sequence[Sequence[int]], *, merge_size: int = 2, window_size: int = 112, patch_size: int = 14
) -> dict[str, np.ndarray]:
  """Where the patches of one row lie: the images of `grid_thw` [I, 3] one after another, merge block by merge block.

  Windows are squares of window_size // merge_size // patch_size merge blocks, cut from the top left corner; those at
  the right and lower edge keep what is left. They never span images or frames. Frames of a video count as images.

  Returns:
    int32 `patch_pos` [P, 2] (row, column), `patch_image` [P] and `patch_window` [P], both numbered from 0 in the row.
  """
  side = window_size // merge_size // patch_size * merge_size  # of a window, in patches
  positions, images, windows = [np.zeros((0, 2), np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
  image = window = 0
  for frames, h, w in ([int(n) for n in grid] for grid in grid_thw):
    row, col = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    blocks = (h // merge_size, merge_size, w // merge_size, merge_size)
    row, col = (x.reshape(blocks).swapaxes(1, 2).reshape(-1) for x in (row, col))
    across = -(-w // side)
    for _ in range(frames):
      positions.append(np.stack([row, col], axis=-1))
      images.append(np.full(h * w, image))
      windows.append(window + row // side * across + col // side)
      image, window = image + 1, window + across * -(-h // side)
  return {
    "patch_pos": np.concatenate(positions).astype(np.int32),
    "patch_image": np.concatenate(images).astype(np.int32),
    "patch_window": np.concatenate(windows).astype(np.int32),
  }


def pad_rows(
  rows: Sequence[tuple[np.ndarray, np.ndarray]],
  *,
  length: int | None = None,
  images: int | None = None,
  merge_size: int = 2,
  window_size: int = 112,
  patch_size: int = 14,
) -> dict[str, np.ndarray]:
  """The vision keys of a batch (DESIGN part 3), padded per row so that they shard with it.

  Args:
    rows: for each row (patches [P_b, patch_dim], grid_thw [I_b, 3]); both may be empty.
    length: patches a row is padded to, a multiple of merge_size^2; the longest row if None.
    images: images a row is padded to, likewise.

  Returns:
    patches float32 [B, P, patch_dim], patch_pos [B, P, 2], patch_image and patch_window [B, P] (-1 = padding),
    grid_thw [B, I, 3] (0 = padding).

  Raises:
    UserError: a row does not fit, or its patches and its grid disagree.
  """
  rows = [(np.asarray(patches, np.float32), np.asarray(grid, np.int32).reshape(-1, 3)) for patches, grid in rows]
  length = max(len(patches) for patches, _ in rows) if length is None else length
  images = max(len(grid) for _, grid in rows) if images is None else images
  if length % merge_size**2:
    raise UserError(f"{length} patches a row is not a multiple of merge_size^2 = {merge_size**2}")
  out = {
    "patches": np.zeros((len(rows), length, max(p.shape[-1] for p, _ in rows)), np.float32),
    "patch_pos": np.zeros((len(rows), length, 2), np.int32),
    "patch_image": np.full((len(rows), length), -1, np.int32),
    "patch_window": np.full((len(rows), length), -1, np.int32),
    "grid_thw": np.zeros((len(rows), images, 3), np.int32),
  }
  for b, (patches, grid) in enumerate(rows):
    numbers = patch_numbers(grid, merge_size=merge_size, window_size=window_size, patch_size=patch_size)
    count = len(numbers["patch_image"])
    if count != len(patches):
      raise UserError(f"row {b} holds {len(patches)} patches but its grids {grid.tolist()} hold {count}")
    if count > length or len(grid) > images:
      raise UserError(
        f"row {b} has {len(grid)} images with {count} patches; "
        f"the batch takes {images} with {length}: shrink its images"
      )
    if count:
      out["patches"][b, :count] = patches
    out["grid_thw"][b, : len(grid)] = grid
    for key, value in numbers.items():
      out[key][b, :count] = value
  return out


def rope_index(
  tokens: np.ndarray, mask: np.ndarray, grid_thw: np.ndarray, *, image_token: int, merge_size: int = 2
) -> tuple[np.ndarray, np.ndarray]:
  """Positions on the three rotary axes (Qwen2-VL, section 2.1; get_rope_index).

  Text counts on alike on every axis. An image starts there: its merged patches hold (frame, row, column), and text goes
  on after the longer side.

  Args:
    tokens: int [B, L]; mask: bool [B, L], padding on either side; grid_thw: [B, I, 3], each row its own images.

  Returns:
    (positions int32 [B, 3, L], 0 at padding, delta int32 [B]): the token after the n valid ones lies at n + delta.

  Raises:
    UserError: the image tokens of a row do not match its grids.
  """
  tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
  positions = np.zeros((tokens.shape[0], 3, tokens.shape[1]), np.int32)
  deltas = np.zeros(tokens.shape[0], np.int32)
  for b, (row, valid) in enumerate(zip(tokens, mask, strict=True)):
    row = row[valid]
    is_image = row == image_token
    grids = [[int(t), int(h) // merge_size, int(w) // merge_size] for t, h, w in grid_thw[b] if t]
    want, have = sum(math.prod(grid) for grid in grids), int(is_image.sum())
    if want != have:
      raise UserError(
        f"row {b} has {have} image tokens but its {len(grids)} images need {want}: write one per merge block"
      )
    pieces, at, start = [np.zeros((3, 0), np.int64)], 0, 0  # at: index in the row; start: next position
    for grid in [*grids, None]:
      stop = len(row) if grid is None else at + int(np.argmax(is_image[at:]))
      pieces.append(np.broadcast_to(start + np.arange(stop - at), (3, stop - at)))
      at, start = stop, start + stop - at
      if grid is not None:
        count = math.prod(grid)
        if not is_image[at : at + count].all():
          raise UserError(f"row {b}: an image of {count} tokens is interrupted at token {at}: keep them together")
        pieces.append(start + np.indices(grid).reshape(3, -1))
        at, start = at + count, start + max(grid[1:])
    positions[b][:, valid] = np.concatenate(pieces, axis=1)
    deltas[b] = (positions[b].max() + 1 if len(row) else 0) - len(row)
  return positions, deltas
