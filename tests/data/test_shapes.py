import dataclasses
import random

import numpy as np
import pytest
from shapes_words import held_out_words

from blip3o_jax.data import shapes
from blip3o_jax.data.shapes import Caption, Scene, Thing, caption_of, dense_caption, holds, render, sample_scene
from blip3o_jax.evaluation.shapes_judge import judge, satisfies


def scenes(family, count, **kwargs):
  return [sample_scene(random.Random(f"{family} {i}"), family, **kwargs) for i in range(count)]


def test_colours_and_radii_are_the_published_ones():
  image = render(Scene("gray", (Thing("square", "orange", 20, 30, 8),)))
  assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
  assert image[0, 0].tolist() == [128, 128, 128] and image[30, 20].tolist() == [245, 140, 30]
  for scene in scenes(None, 50):
    assert all(6 <= t.r <= 12 for t in scene.things)


@pytest.mark.parametrize(
  ("shape", "area"), [("circle", np.pi), ("square", 3.24), ("triangle", 1.74), ("cross", 20 / 9)]
)
def test_rendered_area_is_that_of_the_shape(shape, area):
  r = 10.3
  image = render(Scene("black", (Thing(shape, "red", 31.3, 30.8, r),))).astype(float)
  covered = ((image - 15) / (np.array([220, 40, 40]) - 15)).mean(axis=-1).sum()
  assert covered == pytest.approx(area * r * r, rel=0.02)


def test_triangles_point_up():
  image = render(Scene("white", (Thing("triangle", "blue", 32, 32, 12),)))
  widths = (image[:, :, 0] < 150).sum(axis=1)
  assert 0 < widths[24] < widths[32] < widths[40]


def test_at_least_two_pixels_of_ground_between_objects():
  for i, scene in enumerate(scenes(None, 40)):
    for a in scene.things:
      alone = [(render(Scene("white", (t,))) < 240).any(axis=-1) for t in (a, *[t for t in scene.things if t is not a])]
      rows, columns = np.nonzero(alone[0])
      for other in alone[1:]:
        y, x = np.nonzero(other)
        apart = np.maximum(np.abs(rows[:, None] - y), np.abs(columns[:, None] - x)).min()
        assert apart > 2, f"scene {i}"


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_captions_are_true_of_their_pictures(family):
  rng = random.Random(family)
  for scene in scenes(family, 25):
    caption = caption_of(scene, family, rng)
    assert satisfies(judge(render(scene)), caption.spec), caption.text


def test_caption_words():
  assert Caption("counting", (("cross", None),) * 3).text == "three crosses"
  assert Caption("position", (("circle", None), ("square", None)), "left of").text == "a circle left of a square"
  things = (("circle", "orange"), ("square", "blue"))
  assert Caption("color_attr", things, ground="gray").text == "an orange circle and a blue square on a gray background"


def test_dense_caption_goes_from_left_to_right():
  scene = Scene("black", (Thing("cross", "red", 50, 50, 7), Thing("circle", "orange", 10, 10, 7)))
  assert dense_caption(scene) == "an orange circle and a red cross on a black background"
  places = "an orange circle at the top left and a red cross at the bottom right"
  assert dense_caption(scene, places=True, ground=False) == places


def test_relations_need_distance_and_the_longer_axis():
  at = lambda x, y: Thing("circle", "red", x, y, 6)
  assert holds(at(10, 30), "left of", at(40, 30)) and holds(at(40, 30), "right of", at(10, 30))
  assert holds(at(30, 10), "above", at(30, 40)) and holds(at(30, 40), "below", at(30, 10))
  assert not holds(at(10, 30), "left of", at(15, 30))
  assert not holds(at(10, 10), "left of", at(30, 40))


@pytest.mark.parametrize("family", [*shapes.FAMILIES, None])
def test_training_scenes_hold_nothing_out_and_say_nothing_held_out(family):
  rng = random.Random(f"say {family}")
  for scene in scenes(family, 30):
    assert not shapes.is_held_out(judge(render(scene)))
    pairs = [(a, relation, b) for a in scene.things for relation in shapes.RELATIONS for b in scene.things]
    shown = {(a.shape, b.shape, relation) for a, relation, b in pairs if a is not b and holds(a, relation, b)}
    assert not any({(a, b, r), (b, a, r)} & shown for a, r, b in shapes.HELD_OUT_RELATIONS)  # in neither order
    texts = [dense_caption(scene), dense_caption(scene, places=True)]
    texts += [caption_of(scene, family, rng).text] if family else []
    assert not [word for text in texts for word in held_out_words(text)]


@pytest.mark.parametrize(
  "scene",
  [
    Scene("gray", (Thing("triangle", "red", 20, 20, 8),)),
    Scene("black", (Thing("circle", "red", 20, 20, 8),)),
    Scene("white", tuple(Thing("cross", "red", x, x, 7) for x in (12, 50))),
    Scene(
      "white", (Thing("cross", "red", 10, 30, 7), Thing("circle", "red", 50, 34, 7), Thing("circle", "red", 30, 5, 6))
    ),
    Scene("gray", (Thing("square", "red", 12, 30, 7), Thing("triangle", "blue", 50, 30, 7))),
  ],
)
def test_held_out_scenes_are_recognised(scene):
  assert shapes.is_held_out(scene)


def test_prompts_cover_every_family_and_hold_out_what_they_say():
  held, seen = shapes.heldout_prompts(), shapes.seen_prompts()
  for family in shapes.FAMILIES:
    assert 4 <= sum(c.family == family for c in held) == sum(c.family == family for c in seen) <= 12
  assert all(held_out_words(c.text) and shapes.names_held_out(c) for c in held)
  assert not any(held_out_words(c.text) or shapes.names_held_out(c) for c in seen)
  assert len({c.text for c in held}) == len(held) and len({c.text for c in seen}) == len(seen)
  named = " ; ".join(c.text for c in held)
  assert all(f"{colour} {shape}" in named for colour, shape in shapes.HELD_OUT_PAIRS)


def test_unnamed_colours_are_no_named_ones():
  """The same things at the same places; no combination can become a held-out one, in pixels neither."""
  rng, unnamed, read = random.Random(0), 0, 0
  for _ in range(200):
    scene = shapes.sample_scene(rng)
    changed = shapes.with_unnamed_colours(scene, rng)
    bare = lambda scene: [dataclasses.replace(thing, colour="") for thing in scene.things]
    assert bare(changed) == bare(scene) and changed.ground == scene.ground and not shapes.is_held_out(changed)
    named = {thing.colour for thing in changed.things} & set(shapes.COLOURS)
    unnamed += sum(thing.colour not in shapes.COLOURS for thing in changed.things)
    read += sum(thing.colour is None for thing in judge(render(changed)).things)
    assert {thing.colour for thing in judge(render(changed)).things} <= named | {None}
    assert not {"#", "("} & set(shapes.dense_caption(changed, places=True))
  assert unnamed > 150 and read > 0.75 * unnamed
