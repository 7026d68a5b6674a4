"""How torch lays out the arrays of one layer, and how we do: a name for each pair of layouts (floor 3)."""

import functools
from collections.abc import Callable

import numpy as np


def _square_patch(rows: int, per_pixel: int) -> int:
  side = round((rows / per_pixel) ** 0.5)
  if side * side * per_pixel != rows:
    raise ValueError(f"{rows} rows are not a square patch of {per_pixel} numbers a pixel")
  return side


def _patch_conv_inverse(x: np.ndarray, channels: int = 3) -> np.ndarray:
  side = _square_patch(x.shape[0], channels)
  return x.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)


def _patch_conv3d_inverse(x: np.ndarray, channels: int = 3, frames: int = 2) -> np.ndarray:
  side = _square_patch(x.shape[0], channels * frames)
  return x.T.reshape(-1, channels, frames, side, side)


def _channels_first_inverse(x: np.ndarray, channels: int = 3) -> np.ndarray:
  side = _square_patch(x.shape[0], channels)
  return x.T.reshape(-1, channels, side, side)


# name -> (reference array -> ours, ours -> reference), both on one layer's array.
TRANSFORMS: dict[str, tuple[Callable, Callable]] = {
  "none": (lambda x: x, lambda x: x),
  # [out, in] <-> [in, out]
  "linear": (lambda x: x.T, lambda x: x.T),
  # [out, in, kh, kw] <-> [kh, kw, in, out]
  "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
  # [out, in, 1, 1] <-> [in, out]
  "conv1x1_linear": (lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[:, :, None, None]),
  # [out, in, k, k] <-> [k * k * in, out]: patches flattened (row, column, channel), as a reshape of NHWC gives them
  "patch_conv": (lambda x, c=3: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _patch_conv_inverse),
  # [out, in, k, k] <-> [in * k * k, out]: patches flattened (channel, row, column)
  "patch_conv_channels_first": (lambda x, c=3: x.reshape(x.shape[0], -1).T, _channels_first_inverse),
  # [out, in, t, k, k] <-> [in * t * k * k, out]: Qwen2.5-VL's patches (channel, frame, row, column)
  "patch_conv3d": (lambda x, c=3, t=2: x.reshape(x.shape[0], -1).T, _patch_conv3d_inverse),
  # [1, ...] <-> [...] and [1, 1, ...] <-> [...]
  "squeeze": (lambda x: x.reshape(x.shape[1:]), lambda x: x[None]),
  "squeeze2": (lambda x: x.reshape(x.shape[2:]), lambda x: x[None, None]),
}


def _transform(name: str, direction: int) -> Callable:
  name, *arguments = name.split(":")
  function = TRANSFORMS[name][direction]
  return functools.partial(lambda *more, x: function(x, *more), *map(int, arguments))


def to_ours_array(transform: str, x: np.ndarray) -> np.ndarray:
  """One reference array in our layout (a view where numpy can give one)."""
  return _transform(transform, 0)(x=x)


def to_reference_array(transform: str, x: np.ndarray) -> np.ndarray:
  """One of our arrays (one layer of it) in the reference's layout."""
  return _transform(transform, 1)(x=x)
