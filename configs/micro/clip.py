"""The miniature, stage 2 of 6: the CLIP encoder (the release takes EVA-CLIP-E/14+).

blip3o train --config configs/micro/clip.py --workdir runs/micro/clip
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "seed": 0,
      "steps": 1500,
      "batch_size": 128,
      "objective": "contrastive",
      "objective_args": {"moment_weight": 1.0, "pixel_weight": 1.0},
      "model": {"preset": "micro"},
      "trainable": ("clip/", "text_tower/"),
      "init_from": "runs/micro/vae/model",
      "data": {
        "task": "captions",
        "path": "runs/shapes/contrastive",
        "image_size": 64,
        "max_length": 40,
        "cache": True,
      },
      "optimizer": {"learning_rate": 1e-3, "b2": 0.99, "weight_decay": 0.01},
      "schedule": {"name": "cosine_min", "min_ratio": 0.02, "warmup_steps": 100},
      "ema_decay": 0.998,
      "compute_dtype": "float32",
      "save_every": 500,
      "log_every": 20,
    }
  )
