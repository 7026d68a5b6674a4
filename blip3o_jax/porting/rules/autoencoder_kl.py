"""diffusers' AutoencoderKL (SDXL's VAE) <-> models.autoencoder_kl (spec 10.5)."""

from blip3o_jax.porting.convert import Rule


def conv(source: str, target: str) -> list[Rule]:
  """A convolution with its bias."""
  return [Rule(f"{source}.weight", f"{target}/kernel", "conv"), Rule(f"{source}.bias", f"{target}/bias")]


def dense(source: str, target: str, *, bias: bool = True, old: str | None = None) -> list[Rule]:
  """A linear layer; `old` is an earlier spelling of its name."""
  alias = lambda leaf: (f"{old}.{leaf}",) if old else ()
  weight = Rule(f"{source}.weight", f"{target}/kernel", "linear", alias("weight"))
  return [weight, Rule(f"{source}.bias", f"{target}/bias", aliases=alias("bias"))] if bias else [weight]


def norm(source: str, target: str) -> list[Rule]:
  """A normalisation with gain and bias."""
  return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


def resnet(source: str, target: str) -> list[Rule]:
  """A residual block; the shortcut is there where the width changes."""
  return [
    *norm(f"{source}.norm1", f"{target}/norm1"),
    *conv(f"{source}.conv1", f"{target}/conv1"),
    *norm(f"{source}.norm2", f"{target}/norm2"),
    *conv(f"{source}.conv2", f"{target}/conv2"),
    *conv(f"{source}.conv_shortcut", f"{target}/conv_shortcut"),
  ]


def _part(part: str, side: str) -> list[Rule]:
  """The encoder (side "down") or the decoder ("up")."""
  middle = f"{part}.mid_block.attentions.0"
  attention = {"to_q": ("q", "query"), "to_k": ("k", "key"), "to_v": ("v", "value"), "to_out.0": ("out", "proj_attn")}
  return [
    *conv(f"{part}.conv_in", f"{part}/conv_in"),
    *resnet(f"{part}.{side}_blocks.{{i}}.resnets.{{j}}", f"{part}/{side}_{{i}}_resnet_{{j}}"),
    *conv(f"{part}.{side}_blocks.{{i}}.{side}samplers.0.conv", f"{part}/{side}_{{i}}_{side}sample/conv"),
    *resnet(f"{part}.mid_block.resnets.{{j}}", f"{part}/mid_resnet_{{j}}"),
    *norm(f"{middle}.group_norm", f"{part}/mid_norm"),
    # Files written before diffusers 0.18 say query, key, value and proj_attn.
    *(
      rule
      for new, (ours, old) in attention.items()
      for rule in dense(f"{middle}.{new}", f"{part}/mid_{ours}", old=f"{middle}.{old}")
    ),
    *norm(f"{part}.conv_norm_out", f"{part}/norm_out"),
    *conv(f"{part}.conv_out", f"{part}/conv_out"),
  ]


RULES = [
  *_part("encoder", "down"),
  *_part("decoder", "up"),
  *conv("quant_conv", "quant_conv"),
  *conv("post_quant_conv", "post_quant_conv"),
]
