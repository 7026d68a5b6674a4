"""The miniature, stage 1 of 6: the VAE (the release takes SDXL's).

blip3o data make-shapes --out runs/shapes
blip3o train --config configs/micro/vae.py --workdir runs/micro/vae

Two CPU cores (AMD EPYC, AVX-512), 2026-11-21: 1000 s; mean absolute error 0.021 of a range of 2. The bundled model
had 800 more on 2026-11-29, when the corpus had got colours without a name.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "seed": 0,
      "steps": 3000,
      "batch_size": 32,
      "objective": "autoencoding",
      "objective_args": {"kl_weight": 1e-6, "moment_weight": 0.1},
      "model": {"preset": "micro"},
      "trainable": ("vae/",),
      "tokenizer": "runs/shapes/tokenizer",
      "data": {"task": "images", "path": "runs/shapes/contrastive", "image_size": 64, "cache": True},
      "optimizer": {"learning_rate": 2e-3, "b2": 0.99},
      "schedule": {"name": "cosine_min", "min_ratio": 0.02, "warmup_steps": 100},
      "ema_decay": 0.998,
      "compute_dtype": "float32",
      "save_every": 500,
      "log_every": 20,
    }
  )
