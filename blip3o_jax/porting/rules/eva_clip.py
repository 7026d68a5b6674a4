"""EVA-CLIP's visual tower (spec 10.3) <-> models.eva_clip. Also reads the original layout, with q_bias and v_bias."""

from blip3o_jax.porting.convert import Rule


def _dense(source: str, target: str) -> list[Rule]:
  return [Rule(f"{source}.weight", f"{target}/kernel", "linear"), Rule(f"{source}.bias", f"{target}/bias")]


def _norm(source: str, target: str) -> list[Rule]:
  return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


RULES = [
  Rule("cls_token", "cls_token", "squeeze"),
  Rule("pos_embed", "pos_embed", "squeeze"),
  Rule("patch_embed.proj.weight", "patch_embed/kernel", "patch_conv"),
  Rule("patch_embed.proj.bias", "patch_embed/bias"),
  Rule("blocks.{i}.attn.qkv.weight", tuple(f"layers/{n}/kernel" for n in "qkv"), "linear"),
  Rule(
    "blocks.{i}.attn.qkv.bias",
    tuple(f"layers/{n}/bias" for n in "qkv"),
    aliases=(("blocks.{i}.attn.q_bias", None, "blocks.{i}.attn.v_bias"),),  # that layout has no key bias
  ),
  *_dense("blocks.{i}.attn.proj", "layers/proj"),
  *_dense("blocks.{i}.mlp.fc1", "layers/fc1"),
  *_dense("blocks.{i}.mlp.fc2", "layers/fc2"),
  *_norm("blocks.{i}.norm1", "layers/norm1"),
  *_norm("blocks.{i}.norm2", "layers/norm2"),
  # The release loads its stand-alone file leniently: a final norm and a head may be there and are not used (spec 10.3).
  *(Rule(f"{name}.{{*}}", None) for name in ("norm", "fc_norm", "head")),
]
