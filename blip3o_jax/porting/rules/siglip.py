"""transformers' SiglipVisionModel <-> models.siglip (spec 7.1). Also reads keys without their `vision_model.`, and
passes over the pooling head where the model has none."""

from blip3o_jax.porting.convert import Rule


def _rule(source: str, target: str | tuple[str, ...], transform: str = "none", optional: bool = False) -> Rule:
  return Rule(f"vision_model.{source}", target, transform, aliases=(source,), optional=optional)


def _dense(source: str, target: str, optional: bool = False) -> list[Rule]:
  kernel = _rule(f"{source}.weight", f"{target}/kernel", "linear", optional)
  return [kernel, _rule(f"{source}.bias", f"{target}/bias", optional=optional)]


def _norm(source: str, target: str, optional: bool = False) -> list[Rule]:
  return [
    _rule(f"{source}.weight", f"{target}/scale", optional=optional),
    _rule(f"{source}.bias", f"{target}/bias", optional=optional),
  ]


_LAYER = "encoder.layers.{i}"

RULES = [
  _rule("embeddings.patch_embedding.weight", "patch_embed/kernel", "patch_conv"),
  _rule("embeddings.patch_embedding.bias", "patch_embed/bias"),
  _rule("embeddings.position_embedding.weight", "pos_embed"),
  *(rule for x in "qkv" for rule in _dense(f"{_LAYER}.self_attn.{x}_proj", f"layers/{x}")),
  *_dense(f"{_LAYER}.self_attn.out_proj", "layers/out"),
  *_dense(f"{_LAYER}.mlp.fc1", "layers/fc1"),
  *_dense(f"{_LAYER}.mlp.fc2", "layers/fc2"),
  *_norm(f"{_LAYER}.layer_norm1", "layers/norm1"),
  *_norm(f"{_LAYER}.layer_norm2", "layers/norm2"),
  *_norm("post_layernorm", "norm"),
  _rule("head.probe", "head/probe", "squeeze2", optional=True),
  _rule("head.attention.in_proj_weight", tuple(f"head/{x}/kernel" for x in "qkv"), "linear", optional=True),
  _rule("head.attention.in_proj_bias", tuple(f"head/{x}/bias" for x in "qkv"), optional=True),
  *_dense("head.attention.out_proj", "head/out", optional=True),
  *_norm("head.layernorm", "head/norm", optional=True),
  *_dense("head.mlp.fc1", "head/fc1", optional=True),
  *_dense("head.mlp.fc2", "head/fc2", optional=True),
]
