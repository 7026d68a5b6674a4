"""diffusers' UNet2DConditionModel (SDXL's structure) <-> models.unet (spec 10.5)."""

from blip3o_jax.porting.convert import Rule
from blip3o_jax.porting.rules.autoencoder_kl import conv, dense, norm, resnet


def _resnet(source: str, target: str) -> list[Rule]:
  return [*resnet(source, target), *dense(f"{source}.time_emb_proj", f"{target}/time_emb_proj")]


def _transformer(source: str, target: str) -> list[Rule]:
  layer, layers = f"{source}.transformer_blocks.{{n}}", f"{target}/layers"
  attentions = (("attn1", "self_attention"), ("attn2", "cross_attention"))
  return [
    *norm(f"{source}.norm", f"{target}/norm"),
    *dense(f"{source}.proj_in", f"{target}/proj_in"),
    *dense(f"{source}.proj_out", f"{target}/proj_out"),
    *(rule for name in ("norm1", "norm2", "norm3") for rule in norm(f"{layer}.{name}", f"{layers}/{name}")),
    *(
      rule
      for theirs, ours in attentions
      for x in "qkv"
      for rule in dense(f"{layer}.{theirs}.to_{x}", f"{layers}/{ours}/{x}", bias=False)
    ),
    *(rule for theirs, ours in attentions for rule in dense(f"{layer}.{theirs}.to_out.0", f"{layers}/{ours}/out")),
    *dense(f"{layer}.ff.net.0.proj", f"{layers}/mlp_in"),
    *dense(f"{layer}.ff.net.2", f"{layers}/mlp_out"),
  ]


RULES = [
  *conv("conv_in", "conv_in"),
  *(
    rule
    for name in ("time_embedding", "add_embedding")
    for k in (1, 2)
    for rule in dense(f"{name}.linear_{k}", f"{name}_{k}")
  ),
  *(
    rule
    for side in ("down", "up")
    for rule in (
      *_resnet(f"{side}_blocks.{{i}}.resnets.{{j}}", f"{side}_{{i}}_resnet_{{j}}"),
      *_transformer(f"{side}_blocks.{{i}}.attentions.{{j}}", f"{side}_{{i}}_attention_{{j}}"),
      *conv(f"{side}_blocks.{{i}}.{side}samplers.0.conv", f"{side}_{{i}}_{side}sample/conv"),
    )
  ),
  *_resnet("mid_block.resnets.{j}", "mid_resnet_{j}"),
  *_transformer("mid_block.attentions.{j}", "mid_attention_{j}"),
  *norm("conv_norm_out", "norm_out"),
  *conv("conv_out", "conv_out"),
]
