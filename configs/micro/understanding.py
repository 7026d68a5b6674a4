"""The miniature, stage 4 of 6: understanding (the release takes Qwen2.5-VL). Frozen ever after.

blip3o train --config configs/micro/understanding.py --workdir runs/micro/understanding

Two CPU cores (AMD EPYC, AVX-512), 2026-11-21: 2371 s; 0.872 of 1000 questions on held-out pictures answered right. The
bundled model had 2500 more on 2026-11-29, when half of the corpus had become text alone: 2659 s, and 0.879.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "seed": 0,
      "steps": 3500,
      "batch_size": 32,
      "objective": "understanding",
      "model": {"preset": "micro"},
      "trainable": ("backbone/",),
      "init_from": "runs/micro/decoder/model",
      "data": {
        "task": "conversations",
        "path": "runs/shapes/understanding/questions.jsonl",
        "max_length": 192,
        "max_patches": 64,
      },
      "optimizer": {"name": "muon", "learning_rate": 5e-3, "b2": 0.99, "weight_decay": 0.01},
      "schedule": {"name": "cosine_min", "min_ratio": 0.02, "warmup_steps": 100},
      "ema_decay": 0.998,
      "compute_dtype": "float32",
      "save_every": 500,
      "log_every": 20,
    }
  )
