"""The diffusion transformer (spec 10.2) <-> models.next_dit."""

from blip3o_jax.porting.convert import Rule


def _linear(source: str, target: str, bias: bool = False) -> list[Rule]:
  rules = [Rule(f"model.{source}.weight", f"{target}/kernel", "linear")]
  return rules + [Rule(f"model.{source}.bias", f"{target}/bias")] * bias


def _norm(source: str, target: str, bias: bool = False) -> list[Rule]:
  rules = [Rule(f"model.{source}.weight", f"{target}/scale")]
  return rules + [Rule(f"model.{source}.bias", f"{target}/bias")] * bias


def _attention(source: str, target: str) -> list[Rule]:
  rules = [rule for n in "qkv" for rule in _linear(f"layers.{{i}}.{source}.to_{n}", f"layers/{target}_{n}")]
  return rules + [
    rule for n in "qk" for rule in _norm(f"layers.{{i}}.{source}.norm_{n}", f"layers/{target}_{n}_norm", bias=True)
  ]


RULES = [
  *_linear("patch_embedder.proj", "patch_embed", bias=True),
  *_linear("caption_projection.linear_1", "condition_fc1", bias=True),
  *_linear("caption_projection.linear_2", "condition_fc2", bias=True),
  *_linear("time_caption_embed.timestep_embedder.linear_1", "time_fc1", bias=True),
  *_linear("time_caption_embed.timestep_embedder.linear_2", "time_fc2", bias=True),
  *_norm("time_caption_embed.caption_embedder.0", "pooled_norm", bias=True),
  *_linear("time_caption_embed.caption_embedder.1", "pooled_fc", bias=True),
  *_linear("norm_out.linear_1", "out_scale", bias=True),
  *_linear("norm_out.linear_2", "out_fc", bias=True),
  *_attention("attn1", "self"),
  *_attention("attn2", "cross"),
  *_linear("layers.{i}.attn2.to_out.0", "layers/out"),  # one output projection for both attentions
  Rule("model.layers.{i}.gate", "layers/gate"),
  *_linear("layers.{i}.norm1.linear", "layers/modulation", bias=True),
  *_norm("layers.{i}.norm1.norm", "layers/norm1"),
  *_norm("layers.{i}.norm1_context", "layers/context_norm"),
  *_norm("layers.{i}.norm2", "layers/norm2"),
  *_norm("layers.{i}.ffn_norm1", "layers/ffn_norm1"),
  *_norm("layers.{i}.ffn_norm2", "layers/ffn_norm2"),
  *_linear("layers.{i}.feed_forward.linear_1", "layers/mlp/gate"),
  *_linear("layers.{i}.feed_forward.linear_3", "layers/mlp/up"),
  *_linear("layers.{i}.feed_forward.linear_2", "layers/mlp/down"),
]
