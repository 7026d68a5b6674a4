"""The linear projection of the design "clip_mse". The release names its place `down_projector`, an identity there."""

from blip3o_jax.porting.convert import Rule

RULES = [Rule("weight", "kernel", "linear")]
