"""How pictures reach a language model, on the host: one class for each kind of understanding tower, alike outside.

read(image)                  one picture as its tower takes it
tokens(picture)              how many tokens it takes; patches_a_token: of the tower
place(picture)               the text that stands for it in a message
rows(rows, tokens, images)   the arrays of a batch, padded per row so that they shard with it
positions(tokens, mask, arrays)  where the tokens of the batch lie
shown(sample)                what a row's arrays show: uint8 [H, W, 3], or None where it has no picture
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.data import vision
from blip3o_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class QwenPictures:
  """Qwen2.5-VL: a picture of any size, cut into patches (see data.vision)."""

  processor: vision.ImageProcessor
  image_token: int
  window_size: int = 112

  @property
  def patches_a_token(self) -> int:
    """Blocks of so many are merged."""
    return self.processor.merge_size**2

  def read(self, image: Image.Image | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(patches float32 [P, patch_dim], grid int32 [3])."""
    return self.processor(image)

  def tokens(self, picture: tuple[np.ndarray, np.ndarray]) -> int:
    """One for every block of patches that the tower merges."""
    return len(picture[0]) // self.patches_a_token

  def place(self, picture: tuple[np.ndarray, np.ndarray]) -> str:
    """A pad for every token."""
    return f"<|vision_start|>{'<|image_pad|>' * self.tokens(picture)}<|vision_end|>"

  def rows(
    self, rows: Sequence[Sequence[Any]], *, tokens: int | None = None, images: int | None = None
  ) -> dict[str, np.ndarray]:
    """patches, patch_pos, patch_image, patch_window, grid_thw of a batch: see vision.pad_rows.

    Args:
      rows: for each row its pictures, as `read` gives them.
      tokens, images: how many a row is padded to; those of the fullest row if None.
    """
    length = None if tokens is None else tokens * self.patches_a_token
    p, m = self.processor.patch_size, self.processor.merge_size
    blank = (np.zeros((0, 3 * self.processor.temporal_patch_size * p**2), np.float32), np.zeros((0, 3), np.int32))
    joined = [(np.concatenate([x for x, _ in row]), np.stack([g for _, g in row])) if row else blank for row in rows]
    return vision.pad_rows(
      joined, length=length, images=images, merge_size=m, window_size=self.window_size, patch_size=p
    )

  def positions(self, tokens: np.ndarray, mask: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """int32 [B, 3, L] on the three rotary axes: see vision.rope_index."""
    merge = self.processor.merge_size
    return vision.rope_index(tokens, mask, arrays["grid_thw"], image_token=self.image_token, merge_size=merge)[0]

  def shown(self, sample: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The first picture of one row."""
    there = sample["patch_image"] == 0
    return self.processor.picture(sample["patches"][there], sample["patch_pos"][there]) if there.any() else None


@dataclasses.dataclass(frozen=True)
class SiglipPictures:
  """Qwen3 with SigLIP2 (spec 8): every picture is squashed to one square and takes all of the tower's tokens."""

  size: int
  count: int  # tokens of one picture
  image_token: int
  resample: int = Image.Resampling.BILINEAR
  patches_a_token = 1

  @classmethod
  def from_reference(cls, config: Mapping[str, Any], *, size: int, count: int, image_token: int) -> "SiglipPictures":
    """From a preprocessor_config.json.

    Raises:
      UserError: pictures of another size than the tower's, or colours other than the model's (x - 0.5) / 0.5.
    """
    if (given := config.get("size", {}).get("height")) != size:
      raise UserError(f"preprocessor: pictures are {given} high, for a tower that sees squares of {size}")
    if any(value != 0.5 for key in ("image_mean", "image_std") for value in config.get(key, ())):
      raise UserError("preprocessor: image_mean and image_std other than 0.5 are not supported for SigLIP")
    return cls(size, count, image_token, config.get("resample", cls.resample))

  def read(self, image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 [S, S, 3]; the model makes -1..1 of it."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.asarray(image.convert("RGB").resize((self.size, self.size), self.resample))

  def tokens(self, picture: np.ndarray) -> int:
    """All of the tower's, whatever the picture."""
    del picture
    return self.count

  def place(self, picture: np.ndarray) -> str:
    """One `<image>` for every token."""
    return f"[IMG]{'<image>' * self.tokens(picture)}[/IMG]"

  def rows(
    self, rows: Sequence[Sequence[np.ndarray]], *, tokens: int | None = None, images: int | None = None
  ) -> dict[str, np.ndarray]:
    """{"images": uint8 [B, I, S, S, 3]}, black after the pictures of a row.

    Args:
      rows: for each row its pictures, as `read` gives them.
      tokens: not looked at. images: how many a row is padded to; those of the fullest row if None.
    """
    del tokens
    out = np.zeros((len(rows), images or max(map(len, rows)), self.size, self.size, 3), np.uint8)
    for b, row in enumerate(rows):
      if row:
        out[b, : len(row)] = row
    return {"images": out}

  def positions(self, tokens: np.ndarray, mask: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """int32 [B, 3, L], plain counting. Raises UserError where a picture is cut off."""
    del arrays
    for row, valid in zip(tokens, mask, strict=True):
      if (count := int((row[valid] == self.image_token).sum())) % self.count:
        raise UserError(f"a row has {count} image tokens, {self.count} a picture: it is cut; make max_length larger")
    counted = np.maximum(np.cumsum(mask, axis=-1) - 1, 0) * mask
    return np.repeat(counted[:, None], 3, axis=1).astype(np.int32)

  def shown(self, sample: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The first picture of one row."""
    return sample["images"][0] if (sample["tokens"] == self.image_token).any() else None


Pictures = QwenPictures | SiglipPictures
