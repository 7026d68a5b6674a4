"""diffusers' AutoencoderDC (Sana's autoencoder) <-> models.autoencoder_dc (spec 7.1)."""

from blip3o_jax.porting.convert import Rule
from blip3o_jax.porting.rules.autoencoder_kl import conv, dense, norm


def _gated(source: str, target: str) -> list[Rule]:
  return [
    Rule(f"{source}.conv_inverted.weight", f"{target}/widen/kernel", "conv1x1_linear"),
    Rule(f"{source}.conv_inverted.bias", f"{target}/widen/bias"),
    *conv(f"{source}.conv_depth", f"{target}/depthwise"),
    Rule(f"{source}.conv_point.weight", f"{target}/narrow/kernel", "conv1x1_linear"),
  ]


def _part(part: str, side: str) -> list[Rule]:
  """The encoder (side "down") or the decoder ("up"). Position j of level i is a block or the change of size."""
  source, target = f"{part}.{side}_blocks.{{i}}.{{j}}", f"{part}/{side}_{{i}}_{{j}}"
  scale = f"{source}.attn.to_qkv_multiscale.{{k}}"
  return [
    *conv(f"{part}.conv_in", f"{part}/conv_in"),
    *conv(f"{part}.conv_in.conv", f"{part}/conv_in/conv"),  # where the first level has no blocks
    *conv(f"{source}.conv", f"{target}/conv"),
    *conv(f"{source}.conv1", f"{target}/conv1"),
    Rule(f"{source}.conv2.weight", f"{target}/conv2/kernel", "conv"),
    *norm(f"{source}.norm", f"{target}/norm"),
    *(rule for x in "qkv" for rule in dense(f"{source}.attn.to_{x}", f"{target}/{x}", bias=False)),
    *dense(f"{source}.attn.to_out", f"{target}/out", bias=False),
    Rule(f"{scale}.proj_in.weight", f"{target}/scale_{{k}}_depthwise/kernel", "conv"),
    Rule(f"{scale}.proj_out.weight", f"{target}/scale_{{k}}_kernel", "conv1x1_linear"),
    *norm(f"{source}.attn.norm_out", f"{target}/out_norm"),
    *_gated(f"{source}.conv_out", f"{target}/mlp"),
    *norm(f"{source}.conv_out.norm", f"{target}/mlp_norm"),
    *norm(f"{part}.norm_out", f"{part}/norm_out"),
    *conv(f"{part}.conv_out", f"{part}/conv_out"),
    *conv(f"{part}.conv_out.conv", f"{part}/conv_out/conv"),
  ]


RULES = [*_part("encoder", "down"), *_part("decoder", "up")]
