"""Questions and answers about the built-in world: about a picture, and about a caption alone (DESIGN part 4).

Every function returns turns [(question, answer)]. Training turns neither show nor name a held-out combination.
"""

import dataclasses
import random

from blip3o_jax.data.shapes import (
  COLOURS,
  FAMILIES,
  HELD_OUT_PAIRS,
  INVERSE,
  NUMBERS,
  PLURALS,
  RELATIONS,
  SHAPES,
  Caption,
  Scene,
  caption_of,
  dense_caption,
  holds,
  names_held_out,
  noun,
  place_of,
  relation_of,
  sample_scene,
)
from blip3o_jax.data.templates import WORDINGS

_SIDES = {
  "left of": ("left", "right"),
  "right of": ("right", "left"),
  "above": ("top", "bottom"),
  "below": ("bottom", "top"),
}


# ---- about a picture


def description(scene: Scene, rng: random.Random) -> tuple[str, str]:
  """One turn that names everything, with or without places."""
  places = rng.random() < 0.5
  return f"describe the picture{' with places' if places else ''}.", dense_caption(scene, places)


def about_picture(scene: Scene, rng: random.Random, count: int, held_out: bool = False) -> list[tuple[str, str]]:
  """Up to `count` different questions, answers of one or two words; `held_out`: they may name held-out combinations."""
  kinds = [
    _colour,
    _shape,
    _count_all,
    _count_shape,
    _ground,
    _exists,
    _exists,
    _related,
    _related,
    _beside,
    _where,
    _where,
  ]
  rng.shuffle(kinds)
  turns: dict[str, str] = {}
  for kind in kinds:
    turn = kind(scene, rng, held_out)
    if turn and len(turns) < count:
      turns.setdefault(*turn)
  return list(turns.items())


def _name(scene: Scene, thing, rng: random.Random) -> str | None:
  """ "the circle" or "the red circle", whatever is unique in the picture."""
  alike = [t for t in scene.things if t.shape == thing.shape]
  if len(alike) == 1 and rng.random() < 0.7:
    return f"the {thing.shape}"
  return f"the {thing.colour} {thing.shape}" if sum(t.colour == thing.colour for t in alike) == 1 else None


def _colour(scene, rng, held_out):
  thing = rng.choice(scene.things)
  if sum(t.shape == thing.shape for t in scene.things) == 1:
    return f"what colour is the {thing.shape}?", thing.colour


def _shape(scene, rng, held_out):
  thing = rng.choice(scene.things)
  if sum(t.colour == thing.colour for t in scene.things) == 1:
    return f"which shape is {thing.colour}?", thing.shape


def _count_all(scene, rng, held_out):
  return "how many objects are there?", NUMBERS[len(scene.things)]


def _count_shape(scene, rng, held_out):
  shape = rng.choice(scene.things).shape if rng.random() < 0.75 else rng.choice(SHAPES)
  return f"how many {PLURALS[shape]} are there?", NUMBERS[sum(t.shape == shape for t in scene.things)]


def _ground(scene, rng, held_out):
  return "what colour is the background?", scene.ground


def _exists(scene, rng, held_out):
  """Half yes; a no keeps the shape or the colour of something that is there."""
  thing = rng.choice(scene.things)
  shape, colour, answer = thing.shape, thing.colour, "yes"
  if rng.random() < 0.5:
    answer = "no"
    if rng.random() < 0.5:
      shape = rng.choice(SHAPES)
    else:
      colour = rng.choice(tuple(COLOURS))
    if any((t.shape, t.colour) == (shape, colour) for t in scene.things):
      return None
  if not held_out and (colour, shape) in HELD_OUT_PAIRS:
    return None
  return f"is there {noun(shape, colour)}?", answer


def _related(scene, rng, held_out):
  """Half yes."""
  if len(scene.things) < 2:
    return None
  a, b = rng.sample(scene.things, 2)
  relation, first, second = relation_of(a, b), _name(scene, a, rng), _name(scene, b, rng)
  if not (relation and first and second):
    return None
  if rng.random() < 0.5:
    return f"is {first} {relation} {second}?", "yes"
  return f"is {first} {INVERSE[relation]} {second}?", "no"


def _beside(scene, rng, held_out):
  """Asked only when one object fits clearly and no other does at all."""
  if len(scene.things) < 2:
    return None
  thing, relation = rng.choice(scene.things), rng.choice(RELATIONS)
  name = _name(scene, thing, rng)
  fits = [t for t in scene.things if t is not thing and holds(t, relation, thing)]
  if name and len(fits) == 1 and relation_of(fits[0], thing) == relation:
    return f"what is {relation} {name}?", f"{fits[0].colour} {fits[0].shape}"


def _where(scene, rng, held_out):
  thing = rng.choice(scene.things)
  name = _name(scene, thing, rng)
  return name and (f"where is {name}?", place_of(thing))


# ---- about a caption alone


def about_captions(rng: random.Random) -> list[tuple[str, str]]:
  """Turns that make a language model take captions apart, without a picture: three captions, one after another."""
  return [turn for _ in range(3) for turn in _about_caption(rng)]


def _about_caption(rng: random.Random) -> list[tuple[str, str]]:
  caption = sample_caption(rng)
  draw = rng.random()
  if draw < 0.4:
    return [(WORDINGS["release"].format(caption=caption.text), plan(caption))]
  if draw < 0.55:
    return [_same(caption, rng)]
  if draw < 0.65 and len(caption.things) == 2 and caption.family != "counting":
    return [(f"caption: {caption.text}. say it the other way round.", _turned(caption).text)]
  kinds = [_asked_colour, _asked_shape, _asked_count, _asked_ground, _asked_relation, _asked_beside, _asked_side]
  rng.shuffle(kinds)
  turns = [turn for kind in kinds if (turn := kind(caption, rng))][:3]
  return [(f"caption: {caption.text}. {turns[0][0]}", turns[0][1]), *turns[1:]]


def sample_caption(rng: random.Random) -> Caption:
  """A caption of the training language. Beyond the six families: relations with colours, and lists of any objects, of
  which some have a colour, so that a word is learnt as one among many others."""
  if rng.random() < 0.3:
    scene = sample_scene(rng)
    things = tuple((t.shape, t.colour if rng.random() < 0.7 else None) for t in scene.things)
    return Caption("list", things, ground=scene.ground if rng.random() < 0.4 else None)
  family = rng.choice((*FAMILIES, "position", "color_attr"))
  scene = sample_scene(rng, family)
  caption = caption_of(scene, family, rng)
  if family == "position" and rng.random() < 0.5:
    colours = {t.shape: t.colour for t in scene.things}
    caption = dataclasses.replace(caption, things=tuple((shape, colours[shape]) for shape, _ in caption.things))
  return caption


def plan(caption: Caption) -> str:
  """What to draw, object by object: "two objects: circle left, square right. gray background." """
  words = [f"{colour} {shape}" if colour else shape for shape, colour in caption.things]
  if caption.relation:
    words = [f"{word} {side}" for word, side in zip(words, _SIDES[caption.relation], strict=True)]
  count = "one object" if len(words) == 1 else f"{NUMBERS[len(words)]} objects"
  return f"{count}: {', '.join(words)}. {caption.ground or 'any'} background."


def _turned(caption: Caption) -> Caption:
  """The same claim with its two things in the other order."""
  return dataclasses.replace(caption, things=caption.things[::-1], relation=INVERSE.get(caption.relation))


def _same(caption: Caption, rng: random.Random) -> tuple[str, str]:
  """Half yes; a no changes one word."""
  two = len(caption.things) == 2 and caption.family != "counting"
  other = _turned(caption) if two and rng.random() < 0.7 else caption
  answer = "yes"
  if rng.random() < 0.5:
    changed = _changed(other, rng)
    if not names_held_out(changed):
      other, answer = changed, "no"
  return f"caption: {caption.text}. caption: {other.text}. do they say the same?", answer


def _changed(caption: Caption, rng: random.Random) -> Caption:
  (shape, colour), *rest = caption.things
  if caption.family == "counting":
    n = rng.choice([n for n in (2, 3, 4) if n != len(caption.things)])
    return dataclasses.replace(caption, things=caption.things[:1] * n)
  if caption.relation and rng.random() < 0.6:
    return dataclasses.replace(caption, relation=INVERSE[caption.relation])
  others = [name for name in SHAPES if name not in [s for s, _ in caption.things]]
  if (colour and rng.random() < 0.7) or not others:
    colour = rng.choice([name for name in COLOURS if name != colour])
  else:
    shape = rng.choice(others)
  return dataclasses.replace(caption, things=((shape, colour), *rest))


def _asked_colour(caption, rng):
  shape, colour = rng.choice(caption.things)
  alone = sum(s == shape for s, _ in caption.things) == 1
  return colour and alone and (f"what colour is the {shape}?", colour)


def _asked_shape(caption, rng):
  shape, colour = rng.choice(caption.things)
  alone = sum(c == colour for _, c in caption.things) == 1
  return colour and alone and (f"which shape is {colour}?", shape)


def _asked_count(caption, rng):
  shape = caption.things[0][0]
  if rng.random() < 0.5:
    return "how many objects are there?", NUMBERS[len(caption.things)]
  return f"how many {PLURALS[shape]} are there?", NUMBERS[sum(s == shape for s, _ in caption.things)]


def _asked_ground(caption, rng):
  return "what colour is the background?", caption.ground or "any"


def _asked_relation(caption, rng):
  """Half yes, in either order of the two things."""
  if not caption.relation:
    return None
  told = _turned(caption) if rng.random() < 0.5 else caption
  (a, _), (b, _) = told.things
  if rng.random() < 0.5:
    return f"is the {a} {told.relation} the {b}?", "yes"
  return f"is the {a} {INVERSE[told.relation]} the {b}?", "no"


def _asked_beside(caption, rng):
  if not caption.relation:
    return None
  told = _turned(caption) if rng.random() < 0.5 else caption
  (a, colour), (b, _) = told.things
  return f"what is {told.relation} the {b}?", f"{colour} {a}" if colour else a


def _asked_side(caption, rng):
  if not caption.relation:
    return None
  i = rng.randrange(2)
  return f"where is the {caption.things[i][0]}?", _SIDES[caption.relation][i]
