"""The built-in world: small pictures of coloured shapes, their captions, and questions about them (DESIGN part 4).

A `Scene` is what a picture shows; a `Caption` is what a text claims. Some combinations are held out of every stage of
training: `is_held_out(scene)` and `names_held_out(caption)` say which. Everything drawn is a pure function of the
`random.Random` handed in.
"""

import dataclasses
import random

import numpy as np

SIZE = 64
GROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (15, 15, 15)}
COLOURS = {
  "red": (220, 40, 40),
  "green": (40, 170, 60),
  "blue": (50, 80, 220),
  "yellow": (240, 210, 40),
  "purple": (150, 60, 190),
  "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBERS = ("zero", "one", "two", "three", "four")
FAMILIES = ("single_object", "colors", "two_object", "counting", "position", "color_attr")  # GenEval's names
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RADIUS = (6.0, 12.0)  # pixels; objects are smaller where many share the picture
_LARGEST = {1: 12.0, 2: 12.0, 3: 10.5, 4: 9.0}
_GAP = 3.0  # between bounding boxes, so that two whole pixels of ground show through

# Held out of every stage of training.
HELD_OUT_PAIRS = frozenset({("red", "triangle"), ("green", "cross"), ("blue", "circle"), ("yellow", "square")})
HELD_OUT_COUNTS = frozenset({("square", 3), ("cross", 2), ("circle", 4)})
_TRIPLES = (
  ("cross", "left of", "circle"),
  ("triangle", "above", "square"),
  ("square", "left of", "cross"),
  ("circle", "above", "triangle"),
)
HELD_OUT_RELATIONS = frozenset(_TRIPLES) | {(b, INVERSE[relation], a) for a, relation, b in _TRIPLES}
# Of such two shapes training shows neither order on that axis: a model that saw one of them draws it for the other.
UNSEEN_RELATIONS = HELD_OUT_RELATIONS | {(b, relation, a) for a, relation, b in HELD_OUT_RELATIONS}
# All shapes of a picture (sorted) on a ground.
HELD_OUT_GROUNDS = frozenset(
  {
    (("circle",), "black"),
    (("cross",), "gray"),
    (("square",), "white"),
    (("triangle",), "black"),
    (("circle", "square"), "black"),
    (("cross", "triangle"), "gray"),
    (("circle", "cross"), "white"),
    (("square", "triangle"), "gray"),
  }
)


@dataclasses.dataclass(frozen=True)
class Thing:
  """One object: centre (x, y) and radius r in pixels, x to the right and y downwards; `colour` is a name of COLOURS, or
  (r, g, b) where it has none."""

  shape: str
  colour: str | tuple[int, int, int]
  x: float
  y: float
  r: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """What a picture shows."""

  ground: str
  things: tuple[Thing, ...]


@dataclasses.dataclass(frozen=True)
class Caption:
  """What a text claims: exactly these things (shape, colour or None), how the first lies to the second, the ground."""

  family: str
  things: tuple[tuple[str, str | None], ...]
  relation: str | None = None
  ground: str | None = None

  @property
  def text(self) -> str:
    """The caption in words: "a circle left of a square on a gray background"."""
    if self.family == "counting":
      words = f"{NUMBERS[len(self.things)]} {PLURALS[self.things[0][0]]}"
    elif self.relation:
      words = f"{noun(*self.things[0])} {self.relation} {noun(*self.things[1])}"
    else:
      words = join([noun(shape, colour) for shape, colour in self.things])
    return words + (f" on a {self.ground} background" if self.ground else "")

  @property
  def spec(self) -> dict:
    """The claim as plain JSON values, read by evaluation.shapes_judge.satisfies."""
    things = [[shape, colour] for shape, colour in self.things]
    return {"family": self.family, "things": things, "relation": self.relation, "ground": self.ground}


def noun(shape: str, colour: str | None = None) -> str:
  """ "a circle", "an orange circle"."""
  words = f"{colour} {shape}" if colour else shape
  return f"{'an' if words.startswith('orange') else 'a'} {words}"


def holds(a, relation: str, b) -> bool:
  """Whether `a` is left of (right of, above, below) `b`: at least 6 px along that axis, and more than across it."""
  dx, dy = b.x - a.x, b.y - a.y
  along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
  return along >= 6 and along > abs(across)


def relation_of(a, b) -> str | None:
  """The relation that holds clearly, away from the diagonal, or None."""
  dx, dy = abs(b.x - a.x), abs(b.y - a.y)
  if max(dx, dy) < 9 or min(dx, dy) > 0.65 * max(dx, dy):
    return None
  return next(relation for relation in RELATIONS if holds(a, relation, b))


def is_held_out(scene: Scene, relations: frozenset = HELD_OUT_RELATIONS) -> bool:
  """Whether the picture shows any held-out combination, whatever is said about it; of relations any of `relations`."""
  things = scene.things
  if any((t.colour, t.shape) in HELD_OUT_PAIRS for t in things):
    return True
  shapes = tuple(sorted(t.shape for t in things))
  if (shapes, scene.ground) in HELD_OUT_GROUNDS or any((s, shapes.count(s)) in HELD_OUT_COUNTS for s in set(shapes)):
    return True
  return any(
    (a.shape, relation, b.shape) in relations and holds(a, relation, b)
    for a in things
    for b in things
    for relation in RELATIONS
    if a is not b
  )


def names_held_out(caption: Caption) -> bool:
  """Whether the claim itself names a held-out combination."""
  shapes = tuple(sorted(shape for shape, _ in caption.things))
  return (
    any((colour, shape) in HELD_OUT_PAIRS for shape, colour in caption.things)
    or any((shape, shapes.count(shape)) in HELD_OUT_COUNTS for shape in shapes)
    or (shapes, caption.ground) in HELD_OUT_GROUNDS
    or (caption.relation and (caption.things[0][0], caption.relation, caption.things[1][0]) in HELD_OUT_RELATIONS)
  )


# ---- scenes


def sample_scene(rng: random.Random, family: str | None = None, held_out: bool = False) -> Scene:
  """A random scene that a caption of `family` can describe; None: one to four objects of any kind.

  Training scenes (`held_out=False`) show no held-out combination; with `held_out=True` they show at least one.
  """
  while True:
    shapes, colours = _shapes_and_colours(rng, family)
    things = _place(rng, shapes, colours)
    if things is None or (family == "position" and relation_of(*things) is None):
      continue
    scene = Scene(rng.choice(tuple(GROUNDS)), things)
    if is_held_out(scene, HELD_OUT_RELATIONS if held_out else UNSEEN_RELATIONS) == held_out:
      return scene


_TAKEN = np.array([*COLOURS.values(), *GROUNDS.values()])


def with_unnamed_colours(scene: Scene, rng: random.Random) -> Scene:
  """The scene with about half of its things in any colour but those that have a name, and unlike any ground.

  Shapes in such colours, which no prompt can ask for, teach what a shape is whatever its colour.
  """

  def colour():
    while True:
      rgb = tuple(rng.randrange(256) for _ in range(3))
      if np.linalg.norm(_TAKEN - rgb, axis=-1).min() > 75:
        return rgb

  things = [dataclasses.replace(t, colour=colour()) if rng.random() < 0.5 else t for t in scene.things]
  return dataclasses.replace(scene, things=tuple(things))


def _shapes_and_colours(rng: random.Random, family: str | None) -> tuple[list[str], list[str]]:
  names = tuple(COLOURS)
  if family in ("single_object", "colors"):
    return [rng.choice(SHAPES)], [rng.choice(names)]
  if family in ("two_object", "position", "color_attr"):
    return rng.sample(SHAPES, 2), rng.sample(names, 2)
  if family == "counting":
    n = rng.randint(2, 4)
    alike = rng.random() < 0.5
    return [rng.choice(SHAPES)] * n, [rng.choice(names)] * n if alike else rng.choices(names, k=n)
  n = rng.choice((1, 2, 2, 3, 3, 4))
  return rng.choices(SHAPES, k=n), rng.choices(names, k=n)


def _place(rng: random.Random, shapes: list[str], colours: list[str]) -> tuple[Thing, ...] | None:
  """Radii and places such that bounding boxes stay apart, or None when the picture got too full."""
  placed: list[Thing] = []
  for shape, colour in zip(shapes, colours, strict=True):
    r = rng.uniform(RADIUS[0], _LARGEST[len(shapes)])
    low, high = r + 1.5, SIZE - r - 1.5
    for _ in range(12):
      x, y = rng.uniform(low, high), rng.uniform(low, high)
      if all(max(abs(x - t.x), abs(y - t.y)) >= r + t.r + _GAP for t in placed):
        placed.append(Thing(shape, colour, x, y, r))
        break
    else:
      return None
  return tuple(placed)


_COORDINATES = np.arange(SIZE, dtype=np.float32) + 0.5


def render(scene: Scene) -> np.ndarray:
  """The picture, uint8 [64, 64, 3], anti-aliased: coverage of a pixel = clip(1/2 - signed distance, 0, 1)."""
  image = np.empty((SIZE, SIZE, 3), np.float32)
  image[:] = GROUNDS[scene.ground]
  for t in scene.things:
    top, left = max(0, int(t.y - t.r) - 1), max(0, int(t.x - t.r) - 1)
    rows, columns = slice(top, int(t.y + t.r) + 3), slice(left, int(t.x + t.r) + 3)
    distance = signed_distance(t.shape, _COORDINATES[columns] - t.x, (_COORDINATES[rows] - t.y)[:, None], t.r)
    window = image[rows, columns]
    colour = np.array(COLOURS.get(t.colour, t.colour), np.float32)
    window += np.clip(0.5 - distance, 0, 1)[..., None] * (colour - window)
  return (image + 0.5).astype(np.uint8)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
  """Distance in pixels to the outline, negative inside; x and y (broadcast) are relative to the centre.

  Circle of radius r; square of side 1.8 r; triangle 2 r wide and 1.74 r high; cross 2 r wide with arms of 2 r / 3.
  """
  x = np.abs(x)
  if shape == "circle":
    return np.sqrt(x * x + y * y) - r
  if shape == "triangle":
    return np.maximum(y - 0.87 * r, (1.74 * x - (y + 0.87 * r)) / np.float32(2.0069))
  y = np.abs(y)
  if shape == "square":
    return np.maximum(x, y) - 0.9 * r
  return np.maximum(np.maximum(x, y) - r, np.minimum(x, y) - r / 3)


# ---- captions


def caption_of(scene: Scene, family: str, rng: random.Random) -> Caption:
  """A true caption of `family` for a scene sampled for it, its background named in 4 of 10."""
  named = scene.ground if rng.random() < 0.4 else None
  things = list(scene.things)
  rng.shuffle(things)
  relation = relation_of(*things) if family == "position" else None
  coloured = family in ("colors", "color_attr")
  return Caption(family, tuple((t.shape, t.colour if coloured else None) for t in things), relation, named)


def dense_caption(scene: Scene, places: bool = False, ground: bool = True) -> str:
  """Every object from left to right, with its colour if that has a name: "a red circle at the top left and a square at
  the right"."""
  things = sorted(scene.things, key=lambda t: (t.x, t.y))
  name = lambda t: noun(t.shape, t.colour if t.colour in COLOURS else None)
  words = [name(t) + (f" at the {place_of(t)}" if places else "") for t in things]
  return join(words) + (f" on a {scene.ground} background" if ground else "")


def join(words: list[str]) -> str:
  """ "x", "x and y", "x, y and z"."""
  return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def place_of(thing) -> str:
  """One of nine places: "top left", "top", ..., "center"."""
  third = lambda v: min(2, int(3 * v / SIZE))
  words = (("top ", "", "bottom ")[third(thing.y)] + ("left", "", "right")[third(thing.x)]).strip()
  return words or "center"


# ---- prompts of the evaluation


def heldout_prompts() -> list[Caption]:
  """Prompts of every family, each naming a combination held out of training."""
  prompts = []
  for count in (1, 2):
    for shapes, ground in sorted(HELD_OUT_GROUNDS, key=str):
      if len(shapes) == count:
        for order in (shapes, shapes[::-1]) if count == 2 else (shapes,):
          things = tuple((shape, None) for shape in order)
          prompts.append(Caption("single_object" if count == 1 else "two_object", things, ground=ground))
  for i, (colour, shape) in enumerate(sorted(HELD_OUT_PAIRS)):
    prompts += [
      Caption("colors", ((shape, colour),), ground=ground) for ground in (None, "gray", "white", "black")[: 2 + i % 2]
    ]
    # Partners keep to the training combinations, so that one thing at a time is new.
    partners = [(s, c) for s in SHAPES for c in COLOURS if (c, s) not in HELD_OUT_PAIRS and s != shape and c != colour]
    for j, partner in enumerate(partners[i :: len(partners) // 3 + 1]):
      things = ((shape, colour), partner) if j % 2 else (partner, (shape, colour))
      prompts.append(Caption("color_attr", things))
  for shape, count in sorted(HELD_OUT_COUNTS):
    prompts += [
      Caption("counting", ((shape, None),) * count, ground=ground) for ground in (None, "gray", "white", "black")
    ]
  for a, relation, b in sorted(HELD_OUT_RELATIONS):
    prompts.append(Caption("position", ((a, None), (b, None)), relation))
  for a, relation, b in _TRIPLES:
    prompts.append(Caption("position", ((a, None), (b, None)), relation, "gray"))
  return sorted(prompts, key=lambda caption: FAMILIES.index(caption.family))


def seen_prompts() -> list[Caption]:
  """As many prompts of every family as heldout_prompts has, of combinations that training has."""
  wanted = [caption.family for caption in heldout_prompts()]
  rng, prompts = random.Random("seen prompts"), []
  for family in FAMILIES:
    found: dict[str, Caption] = {}
    while len(found) < wanted.count(family):
      caption = caption_of(sample_scene(rng, family), family, rng)
      found.setdefault(caption.text, caption)
    prompts += found.values()
  return prompts
