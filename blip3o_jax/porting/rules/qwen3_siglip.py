"""Qwen3 with SigLIP2 and a projector <-> models.qwen3_siglip (spec part 8). The tower is read with and without the
second `vision_tower.` that the branch's wrapper adds, and written with it."""

import dataclasses

from blip3o_jax.porting.convert import Rule
from blip3o_jax.porting.rules import siglip, text_decoder


def _tower(rule: Rule) -> Rule:
  """The rule for SigLIP's tower where it lies here; its first spelling is `vision_model.*`."""
  return dataclasses.replace(
    rule,
    source=f"model.vision_tower.vision_tower.{rule.source}",
    target=tuple(f"vision/{t}" for t in rule.targets) if len(rule.targets) > 1 else f"vision/{rule.target}",
    aliases=(f"model.vision_tower.{rule.source}",),
  )


RULES = [
  *(text_decoder.under(rule, "text") for rule in text_decoder.RULES),
  *(_tower(rule) for rule in siglip.RULES),
  *(
    rule
    for theirs, ours in ((0, "fc1"), (2, "fc2"))  # 1 is the activation
    for rule in (
      Rule(f"model.mm_projector.{theirs}.weight", f"projector/{ours}/kernel", "linear"),
      Rule(f"model.mm_projector.{theirs}.bias", f"projector/{ours}/bias"),
    )
  ),
]
