"""A small job for the planner: every part of the pretraining step, long enough for the attention kernel."""

from blip3o_jax.training.config import load_config

CONFIG = """
from ml_collections import ConfigDict

W, N = %(width)d, %(layers)d
TEXT = {"vocab": 512, "dim": W, "layers": N, "heads": W // 64, "kv_heads": 2, "head_size": 64, "mlp_dim": 2 * W}
VISION = {"dim": 64, "layers": 1, "heads": 2, "mlp_dim": 64, "full_layers": [0], "out_dim": W}
DIT = {"in_channels": W // 2, "dim": W, "layers": N, "heads": W // 64, "kv_heads": 4, "ffn_dim": 2 * W}
CLIP = {"image_size": 224, "patch_size": 14, "width": W // 2, "layers": N, "heads": 2, "mlp_dim": 2 * W}


def get_config():
  return ConfigDict({
    "batch_size": 16,
    "model": {"preset": "blip3o-8b", "overrides": {
      "backbone": {"text": {**TEXT, "rope_sections": [8, 12, 12]}, "vision": VISION},
      "dit": {**DIT, "condition_dim": W},
      "clip": {**CLIP, "pool_stride": 2},
      "unet": {"context_dim": W // 2, "block_out_channels": [64, 128], "heads": [1, 2], "depths": [0, 1]},
      "vae": {"block_out_channels": [32, 64]},
      "image_size": 64,
    }},
    "data": {"task": "generation", "path": "nowhere", "image_size": 224, "max_length": 128},
    "mesh": {"data": 2, "fsdp": 1, "tensor": 2},
    "remat": "none",
    "sampling": {"steps": 2, "decoder_steps": 2},
  })
"""


def config(folder, *overrides, layers=2, width=256):
  """The config, from a file in `folder` as users write it."""
  path = folder / "small.py"
  path.write_text(CONFIG % {"layers": layers, "width": width})
  return load_config(path, [f"--config.{override}" for override in overrides])
