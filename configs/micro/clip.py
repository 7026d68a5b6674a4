"""The miniature, stage 2 of 6: the CLIP encoder (the release takes EVA-CLIP-E/14+).

blip3o train --config configs/micro/clip.py --workdir runs/micro/clip

One CPU core (AMD EPYC, AVX-512), 2026-11-21: 763 s; a caption found among 64 in 0.828 of the last batch. The bundled
model had 1500 more on 2026-11-29, when the corpus had got colours without a name.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "seed": 0,
      "steps": 2500,
      "batch_size": 64,
      "objective": "contrastive",
      # Captions outweigh the contrast: that a shape can be named through noise is what the DiT lives on.
      "objective_args": {"moment_weight": 1.0, "caption_weight": 5.0, "pixel_weight": 1.0},
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
      "optimizer": {"name": "muon", "learning_rate": 5e-3, "b2": 0.99, "weight_decay": 0.01},
      "schedule": {"name": "cosine_min", "min_ratio": 0.02, "warmup_steps": 100},
      "ema_decay": 0.998,
      "compute_dtype": "float32",
      "save_every": 500,
      "log_every": 20,
    }
  )
