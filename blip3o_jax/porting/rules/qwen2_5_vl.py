"""Qwen2.5-VL <-> models.qwen2_5_vl (spec 10.4). Writes the names of the public checkpoints, reads newer ones too."""

from blip3o_jax.porting.convert import Rule
from blip3o_jax.porting.rules import text_decoder


def _vision(source: str, target: str | tuple[str, ...], transform: str = "none") -> Rule:
  targets = tuple(f"vision/{t}" for t in target) if isinstance(target, tuple) else f"vision/{target}"
  return Rule(f"visual.{source}", targets, transform, aliases=(f"model.visual.{source}",))


def _dense(source: str, *targets: str) -> list[Rule]:
  pick = lambda leaf: tuple(f"{t}/{leaf}" for t in targets) if len(targets) > 1 else f"{targets[0]}/{leaf}"
  return [_vision(f"{source}.weight", pick("kernel"), "linear"), _vision(f"{source}.bias", pick("bias"))]


RULES = [
  *(text_decoder.under(rule, "text") for rule in text_decoder.RULES),
  _vision("patch_embed.proj.weight", "patch_embed/kernel", "patch_conv3d"),
  _vision("blocks.{i}.norm1.weight", "layers/norm1/scale"),
  _vision("blocks.{i}.norm2.weight", "layers/norm2/scale"),
  *_dense("blocks.{i}.attn.qkv", "layers/q", "layers/k", "layers/v"),
  *_dense("blocks.{i}.attn.proj", "layers/proj"),
  *(rule for name in ("gate", "up", "down") for rule in _dense(f"blocks.{{i}}.mlp.{name}_proj", f"layers/mlp/{name}")),
  _vision("merger.ln_q.weight", "merger_norm/scale"),
  *_dense("merger.mlp.0", "merger_fc1"),
  *_dense("merger.mlp.2", "merger_fc2"),
]
