"""Held-out combinations in texts of the built-in world: the tests' own reading, not the package's."""

import re

from blip3o_jax.data import shapes

SHAPE = "(circle|square|triangle|cross)"
GROUND = "(white|gray|black)"


def held_out_words(text: str) -> list[str]:
  """Held-out combinations that a text names."""
  found = [f"{c} {s}" for c, s in shapes.HELD_OUT_PAIRS if re.search(rf"\b{c} {s}", text)]
  for shape, n in shapes.HELD_OUT_COUNTS:
    found += re.findall(rf"\b{shapes.NUMBERS[n]} {shapes.PLURALS[shape]}", text)
  for a, relation, b in re.findall(rf"{SHAPE} (left of|right of|above|below) (?:an?|the) (?:[a-z]+ )?{SHAPE}", text):
    found += [f"{a} {relation} {b}"] if (a, relation, b) in shapes.HELD_OUT_RELATIONS else []
  for a, ground in re.findall(rf"^(?:caption: )?an? (?:[a-z]+ )?{SHAPE} on a {GROUND} background", text):
    found += [f"{a} on {ground}"] if ((a,), ground) in shapes.HELD_OUT_GROUNDS else []
  pair = rf"^(?:caption: )?an? (?:[a-z]+ )?{SHAPE} and an? (?:[a-z]+ )?{SHAPE} on a {GROUND} background"
  for a, b, ground in re.findall(pair, text):
    found += [f"{a}, {b} on {ground}"] if (tuple(sorted((a, b))), ground) in shapes.HELD_OUT_GROUNDS else []
  return found
