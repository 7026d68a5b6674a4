"""Llama 3, Qwen2 and Qwen3 (`LlamaForCausalLM` and kin) <-> models.text_decoder (spec 10.4)."""

import dataclasses

from blip3o_jax.porting.convert import Rule

_MLP = ("gate", "up", "down")
_LAYER = (
  *((f"self_attn.{name}_proj.weight", f"attention/{name}/kernel", "linear") for name in "qkvo"),
  *((f"self_attn.{name}_proj.bias", f"attention/{name}/bias", "none") for name in "qkvo"),
  *((f"self_attn.{name}_norm.weight", f"attention/{name}_norm/scale", "none") for name in "qk"),
  *((f"mlp.{name}_proj.weight", f"mlp/{name}/kernel", "linear") for name in _MLP),
  *((f"mlp.{name}_proj.bias", f"mlp/{name}/bias", "none") for name in _MLP),
  ("input_layernorm.weight", "input_norm/scale", "none"),
  ("post_attention_layernorm.weight", "post_norm/scale", "none"),
)

RULES = [
  Rule("model.embed_tokens.weight", "embedding"),
  *(Rule(f"model.layers.{{i}}.{source}", f"layers/{target}", transform) for source, target, transform in _LAYER),
  Rule("model.norm.weight", "norm/scale"),
  # A checkpoint with tied embeddings may hold the head all the same.
  Rule("lm_head.weight", "head", "linear", optional=True),
]


def under(rule: Rule, path: str) -> Rule:
  """The rule for a decoder that lies at `path` of a larger model; it also reads the names of transformers >= 4.52."""
  new = rule.source.replace("model.", "model.language_model.", 1)
  return dataclasses.replace(
    rule, target=f"{path}/{rule.target}", aliases=(new,) if rule.source.startswith("model.") else ()
  )
