"""The small contrastive text tower. No release holds one: these key names are our own, in the style of the others."""

from blip3o_jax.porting.convert import Rule
from blip3o_jax.porting.rules import text_decoder

RULES = [
  *(text_decoder.under(rule, "text") for rule in text_decoder.RULES),
  Rule("image_norm.weight", "image_norm/scale"),
  Rule("image_norm.bias", "image_norm/bias"),
  Rule("image_projection.weight", "image_proj/kernel", "linear"),
  Rule("text_projection.weight", "text_proj/kernel", "linear"),
  Rule("caption_input.weight", "caption_in/kernel", "linear"),
  Rule("caption_input.bias", "caption_in/bias"),
  Rule("patch_readout.weight", "patch_readout/kernel", "linear"),
  Rule("patch_readout.bias", "patch_readout/bias"),
  Rule("logit_scale", "logit_scale"),
]
