"""The miniature, stage 5 of 6: generation. Queries and DiT learn to draw CLIP features through the frozen backbone.

blip3o train --config configs/micro/generation.py --workdir runs/micro/generation

The bundled model had 4000 steps, 2866 s on two CPU cores (Intel Xeon), 2026-11-29, after which 0.643 of 112 pictures of
held-out prompts were right; and 3600 more in a second round (commands in its model.json), 2406 s.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "seed": 0,
      "steps": 6000,
      "batch_size": 128,
      "objective": "generation",
      # 16 tokens of 96 channels say everything several times over: below half noise there is little left to decide.
      "objective_args": {"drop": 0.1, "times": "continuous", "shift": 6.0},
      "sampling": {"shift": 6.0},
      "model": {"preset": "micro"},
      "trainable": ("queries/", "dit/"),
      "init_from": "runs/micro/understanding/model",
      "data": {
        "task": "generation",
        "path": "runs/shapes/pretrain",
        "image_size": 64,
        "max_length": 60,
        "form": "inference",
        "wording": "release",
        "cache": True,
      },
      "optimizer": {"name": "muon", "learning_rate": 1.2e-2, "b2": 0.99},
      "schedule": {"name": "cosine_min", "min_ratio": 0.02, "warmup_steps": 200},
      "ema_decay": 0.998,
      "compute_dtype": "float32",
      "save_every": 500,
      "log_every": 20,
    }
  )
