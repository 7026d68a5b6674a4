import io
import random

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from blip3o_jax.data import shapes
from blip3o_jax.data.shapes import Caption, Scene, Thing, render, sample_scene
from blip3o_jax.evaluation.shapes_judge import judge, satisfies


def scenes(count):
  for i in range(count):
    yield sample_scene(random.Random(f"judge {i}"), (*shapes.FAMILIES, None, None)[i % 8], held_out=i % 3 == 0)


def right(image, scene):
  """Whether the judge sees exactly the objects of a scene, and each about where it is."""
  reading = judge(image)
  spec = {"things": [[t.shape, t.colour] for t in scene.things], "relation": None, "ground": scene.ground}
  near = lambda t: any(
    s.shape == t.shape and abs(s.x - t.x) < 1.5 and abs(s.y - t.y) < 1.5 and abs(s.r - t.r) < 1.5
    for s in reading.things
  )
  return satisfies(reading, spec) and all(near(t) for t in scene.things)


def worsened(image, rng):
  """Blurred (sigma 0.7), noisy (sigma 10) and compressed (JPEG, quality 85)."""
  image = ndimage.gaussian_filter(image.astype(np.float32), (0.7, 0.7, 0)) + rng.normal(0, 10, image.shape)
  buffer = io.BytesIO()
  Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
  return np.asarray(Image.open(buffer))


def test_reads_rendered_scenes():
  verdicts = [right(render(scene), scene) for scene in scenes(200)]
  assert np.mean(verdicts) > 0.995


def test_reads_blurred_noisy_compressed_scenes():
  rng = np.random.default_rng(0)
  verdicts = [right(worsened(render(scene), rng), scene) for scene in scenes(200)]
  assert np.mean(verdicts) > 0.97


def drawn(distance, colour="red", ground="white", x=31.5, y=32.2):
  across, down = np.arange(64) + 0.5 - x, (np.arange(64) + 0.5 - y)[:, None]
  coverage = np.clip(0.5 - distance(across, down), 0, 1)[..., None]
  return ((1 - coverage) * shapes.GROUNDS[ground] + coverage * np.array(shapes.COLOURS.get(colour, colour))).astype(
    np.uint8
  )


STRANGE = {
  "diamond": lambda x, y: (abs(x) + abs(y) - 10) / 1.414,
  "astroid": lambda x, y: (np.sqrt(abs(x)) + np.sqrt(abs(y))) ** 2 - 16,
  "ellipse": lambda x, y: np.sqrt((x / 1.5) ** 2 + y**2) - 8,
  "bar": lambda x, y: np.maximum(abs(x) / 1.5, abs(y)) - 7,
  "triangle upside down": lambda x, y: shapes.signed_distance("triangle", x, -y, 10),
  "ring": lambda x, y: abs(np.sqrt(x * x + y * y) - 8) - 2.5,
  "diagonal cross": lambda x, y: shapes.signed_distance("cross", (x + y) / 1.414, (x - y) / 1.414, 10),
}


@pytest.mark.parametrize("name", STRANGE)
def test_other_shapes_are_objects_of_no_known_shape(name):
  reading = judge(drawn(STRANGE[name]))
  assert [thing.shape for thing in reading.things] == [None] and reading.things[0].colour == "red"


def test_other_colours_are_objects_of_no_known_colour():
  circle = lambda x, y: np.sqrt(x * x + y * y) - 9
  for colour in ((255, 120, 220), (0, 220, 220)):
    reading = judge(drawn(circle, colour, "black"))
    assert [thing.colour for thing in reading.things] == [None]


def test_other_grounds_are_none():
  assert judge(np.full((64, 64, 3), (190, 190, 190), np.uint8)).ground is None
  assert judge(np.full((64, 64, 3), (200, 30, 30), np.uint8)).ground is None
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
  assert not satisfies(judge(noise), Caption("single_object", (("circle", None),)).spec)
  assert judge(np.full((64, 64, 3), 15, np.uint8)) == type(judge(noise))("black", ())


def test_touching_objects_of_two_colours_are_two():
  things = (Thing("square", "red", 22.9, 32, 10), Thing("square", "blue", 41, 32, 10))
  assert sorted(thing.colour for thing in judge(render(Scene("white", things))).things) == ["blue", "red"]


def test_specks_are_not_objects_but_small_blobs_are():
  image = render(Scene("white", (Thing("circle", "red", 20, 20, 8),)))
  image[50:52, 50:52] = shapes.COLOURS["blue"]
  assert len(judge(image).things) == 1
  image[50:55, 50:55] = shapes.COLOURS["blue"]
  assert len(judge(image).things) == 2


CIRCLE, SQUARE = Thing("circle", "red", 14, 30, 8), Thing("square", "blue", 48, 30, 8)
PAIR = Scene("gray", (CIRCLE, SQUARE))
C, S = ("circle", None), ("square", None)


@pytest.mark.parametrize(
  ("scene", "caption", "verdict"),
  [
    (PAIR, Caption("two_object", (S, C)), True),
    (PAIR, Caption("two_object", (S, C), ground="gray"), True),
    (PAIR, Caption("two_object", (S, C), ground="black"), False),
    (PAIR, Caption("position", (C, S), "left of"), True),
    (PAIR, Caption("position", (S, C), "right of"), True),
    (PAIR, Caption("position", (S, C), "left of"), False),
    (PAIR, Caption("position", (C, S), "above"), False),
    (PAIR, Caption("color_attr", (("circle", "red"), ("square", "blue"))), True),
    (PAIR, Caption("color_attr", (("circle", "blue"), ("square", "red"))), False),
    (PAIR, Caption("single_object", (C,)), False),
    (PAIR, Caption("counting", (C, C)), False),
    (Scene("gray", (CIRCLE, Thing("circle", "blue", 48, 30, 8))), Caption("counting", (C, C)), True),
    (Scene("gray", (CIRCLE,)), Caption("colors", (("circle", "orange"),)), False),
  ],
)
def test_satisfies(scene, caption, verdict):
  assert satisfies(judge(render(scene)), caption.spec) is verdict
