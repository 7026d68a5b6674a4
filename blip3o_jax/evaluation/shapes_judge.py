"""The judge of the built-in world: reads pixels only, no network (DESIGN part 4).

Every pixel is explained as ground mixed with one palette colour; connected regions that are mostly colour are objects.
The shape of an object is the template of the same area and centroid that overlaps it best, if it overlaps well: blur
and noise change neither area nor centroid, unlike corners and bounding boxes. Whatever fits nothing is still an object,
of unknown shape or colour, and makes a picture wrong.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from blip3o_jax.data import shapes

_NAMES = tuple(shapes.COLOURS)
_PALETTE = np.array([shapes.COLOURS[name] for name in _NAMES], np.float32)
_GROUND_NAMES = tuple(shapes.GROUNDS)
_GROUNDS = np.array([shapes.GROUNDS[name] for name in _GROUND_NAMES], np.float32)
SPECK = 12  # pixels; the smallest object of the world covers 55
# Intersection over union that a template must reach. A sharp diamond is a circle to 0.84, an astroid a cross to 0.74;
# the shapes of the world reach these bars under blur and noise, and 0.96 without.
_OVERLAP = {"circle": 0.855, "square": 0.84, "triangle": 0.79, "cross": 0.76}
# Area at r = 1, and how far the centroid lies below the centre.
_TEMPLATES = {"circle": (np.pi, 0.0), "square": (3.24, 0.0), "triangle": (1.74, 0.29), "cross": (20 / 9, 0.0)}
_WIDTHS = (1.0, 2.0)  # pixels that an edge takes, sharp and a little blurred
_FAR = 60.0  # distance in RGB beyond which a region is none of the palette's colours


@dataclasses.dataclass(frozen=True)
class Seen:
  """One object: shape and colour (None: cannot be told), centre and radius in pixels."""

  shape: str | None
  colour: str | None
  x: float
  y: float
  r: float


@dataclasses.dataclass(frozen=True)
class SceneReading:
  """What a picture shows; ground None: no plain background of the world."""

  ground: str | None
  things: tuple[Seen, ...]


def judge(image: np.ndarray) -> SceneReading:
  """Read a picture, uint8 [64, 64, 3]."""
  pixels = np.asarray(image, np.float32)
  palette = np.concatenate([_GROUNDS, _PALETTE])
  nearest = np.argmin(np.sum(np.square(pixels[:, :, None] - palette), axis=-1), axis=-1)
  votes = np.bincount(nearest.ravel(), minlength=len(palette))[: len(_GROUNDS)]
  index = int(np.argmax(votes))
  ground = _GROUNDS[index]
  is_ground = nearest == index
  plain = votes[index] >= pixels[:, :, 0].size / 5 and np.abs(np.median(pixels[is_ground], axis=0) - ground).max() < 40

  # Each pixel as (1 - alpha) ground + alpha colour, with the colour that leaves the least.
  direction = _PALETTE - ground
  alpha = np.clip((pixels - ground) @ direction.T / np.sum(np.square(direction), axis=-1), 0, 1)
  rest = np.linalg.norm(pixels[:, :, None] - ground - alpha[..., None] * direction, axis=-1)
  label = np.argmin(rest, axis=-1)
  best = np.take_along_axis(alpha, label[..., None], axis=-1)[..., 0]
  # A pixel far from ground and palette alike belongs to an object too, an unknown one.
  strange = (rest.min(axis=-1) > _FAR) & (np.linalg.norm(pixels - ground, axis=-1) > _FAR)
  covered = (best > 0.5) | strange

  regions, count = ndimage.label(covered)
  things = []
  for k in range(1, count + 1):
    region = regions == k
    if np.count_nonzero(region) >= SPECK:
      parts = _split(region, label)
      things += [_read(part, pixels, ground, label, covered & ~part) for part in parts]
  return SceneReading(_GROUND_NAMES[index] if plain else None, tuple(things))


def _split(region: np.ndarray, label: np.ndarray) -> list[np.ndarray]:
  """Touching objects of different colours: a part for each connected patch of a colour that fills a quarter or more."""
  inside = ndimage.binary_erosion(region)
  inside = inside if np.count_nonzero(inside) >= SPECK else region
  shares = np.bincount(label[inside], minlength=len(_NAMES)) / np.count_nonzero(inside)
  colours = np.flatnonzero(shares >= 0.25)
  if len(colours) < 2:
    return [region]
  parts = [ndimage.label(region & (label == c)) for c in colours]
  parts = [numbered == k for numbered, count in parts for k in range(1, count + 1)]
  parts = [part for part in parts if np.count_nonzero(part) >= SPECK]
  return parts or [region]


def _read(region: np.ndarray, pixels: np.ndarray, ground: np.ndarray, label: np.ndarray, others: np.ndarray) -> Seen:
  """`others` [H, W] bool: pixels of other objects."""
  inside = ndimage.binary_erosion(region)
  inside = inside if np.count_nonzero(inside) >= SPECK // 2 else region
  colour = int(np.bincount(label[inside], minlength=len(_NAMES)).argmax())
  middle = np.median(pixels[inside], axis=0)
  to_palette = np.linalg.norm(_PALETTE - middle, axis=-1)
  known = np.argmin(to_palette) == colour and to_palette[colour] < _FAR

  # Coverage by this object: how far each pixel has gone from the ground to the object's colour.
  ys, xs = np.nonzero(region)
  rows, columns = slice(max(0, ys.min() - 2), ys.max() + 3), slice(max(0, xs.min() - 2), xs.max() + 3)
  direction = middle - ground
  coverage = (pixels[rows, columns] - ground) @ direction / max(float(direction @ direction), 1.0)
  coverage = np.clip(1.25 * coverage - 0.125, 0, 1)  # noise at both ends falls away
  coverage *= ndimage.binary_dilation(region[rows, columns], iterations=2) & ~others[rows, columns]
  shape, x, y, r = _fit(coverage)
  return Seen(shape, _NAMES[colour] if known else None, columns.start + x, rows.start + y, r)


def _fit(coverage: np.ndarray) -> tuple[str | None, float, float, float]:
  """The template of the same area and centroid that overlaps a coverage best: (shape or None, x, y, r)."""
  h, w = coverage.shape
  across, down = np.arange(w) + 0.5, np.arange(h)[:, None] + 0.5
  area = max(float(coverage.sum()), 1.0)
  x, y = float((coverage * across).sum()) / area, float((coverage * down).sum()) / area
  best = (0.0, None, x, y, float(np.sqrt(area / np.pi)))
  for shape, (unit_area, drop) in _TEMPLATES.items():
    r = float(np.sqrt(area / unit_area))
    distance = shapes.signed_distance(shape, across - x, down - (y - drop * r), r)
    for width in _WIDTHS:
      template = np.clip(0.5 - distance / width, 0, 1)
      overlap = float(np.minimum(template, coverage).sum() / np.maximum(template, coverage).sum())
      best = max(best, (overlap, shape, x, y - drop * r, r), key=lambda fit: fit[0])
  overlap, shape, x, y, r = best
  return shape if shape and overlap >= _OVERLAP[shape] else None, x, y, r


def satisfies(reading: SceneReading, spec: Mapping) -> bool:
  """Whether a picture shows exactly what `spec` (data.shapes.Caption.spec) claims: no object more or less.

  What the claim leaves open (a colour, the ground) may be anything, but plain and of the world.
  """
  wanted, things = spec["things"], reading.things
  if reading.ground is None or spec["ground"] not in (None, reading.ground) or len(things) != len(wanted):
    return False
  if any(thing.shape is None or thing.colour is None for thing in things):
    return False
  return any(
    all(
      thing.shape == shape and colour in (None, thing.colour)
      for thing, (shape, colour) in zip(order, wanted, strict=True)
    )
    and (spec["relation"] is None or shapes.holds(order[0], spec["relation"], order[1]))
    for order in itertools.permutations(things)
  )
