"""Sana with its connector (spec 7.1, 7.3) <-> models.sana.

Written as the released wrapper names them, `transformer.transformer.*` and `transformer.connector.*`. Also read:
`transformer.*` beside `connector.*` (the Reconstruction branch), and diffusers' own file, which has no prefix.
"""

from blip3o_jax.porting.convert import Rule


def _rule(source: str, target: str, transform: str = "none") -> Rule:
  return Rule(f"transformer.transformer.{source}", target, transform, aliases=(f"transformer.{source}", source))


def _connector(source: str, target: str, transform: str = "none") -> Rule:
  return Rule(f"transformer.connector.{source}", f"connector/{target}", transform, aliases=(f"connector.{source}",))


def _dense(source: str, target: str, transform: str = "linear") -> list[Rule]:
  return [_rule(f"{source}.weight", f"{target}/kernel", transform), _rule(f"{source}.bias", f"{target}/bias")]


_LAYER = "transformer_blocks.{i}"
_ATTENTIONS = (("attn1", "self"), ("attn2", "cross"))

RULES = [
  _connector("0.weight", "fc1/kernel", "linear"),
  _connector("0.bias", "fc1/bias"),
  _connector("2.weight", "fc2/kernel", "linear"),
  _connector("2.bias", "fc2/bias"),
  _connector("3.weight", "norm/scale"),
  *_dense("patch_embed.proj", "patch_embed", "conv"),
  *_dense("caption_projection.linear_1", "caption_fc1"),
  *_dense("caption_projection.linear_2", "caption_fc2"),
  _rule("caption_norm.weight", "caption_norm/scale"),
  *_dense("time_embed.emb.timestep_embedder.linear_1", "time_fc1"),
  *_dense("time_embed.emb.timestep_embedder.linear_2", "time_fc2"),
  *_dense("time_embed.linear", "time_out"),
  _rule("scale_shift_table", "modulation"),
  *_dense("proj_out", "out_fc"),
  _rule(f"{_LAYER}.scale_shift_table", "layers/modulation"),
  *(
    rule
    for theirs, ours in _ATTENTIONS
    for x, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out"))
    for rule in _dense(f"{_LAYER}.{theirs}.{x}", f"layers/{ours}_{name}")
  ),
  *(
    _rule(f"{_LAYER}.{theirs}.norm_{x}.weight", f"layers/{ours}_{x}_norm/scale")
    for theirs, ours in _ATTENTIONS
    for x in "qk"
  ),
  _rule(f"{_LAYER}.norm2.weight", "layers/norm2/scale"),
  _rule(f"{_LAYER}.norm2.bias", "layers/norm2/bias"),
  *_dense(f"{_LAYER}.ff.conv_inverted", "layers/mlp/widen", "conv1x1_linear"),
  *_dense(f"{_LAYER}.ff.conv_depth", "layers/mlp/depthwise", "conv"),
  _rule(f"{_LAYER}.ff.conv_point.weight", "layers/mlp/narrow/kernel", "conv1x1_linear"),
]
