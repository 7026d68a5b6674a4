"""The miniature, stage 3 of 6: the CLIP-conditioned diffusion decoder (the release takes Emu2's).

blip3o train --config configs/micro/decoder.py --workdir runs/micro/decoder

Two CPU cores (Intel Xeon), 2026-11-29: 60 pictures a second. The bundled model had 3000 steps on one core (AMD EPYC),
2026-11-21, 2533 s, when the corpus had no unnamed colours, and 4000 more on it as it is now, after more of VAE and CLIP
too: drawn again from their own features 0.911 of 192 pictures are right, and 0.859 of 192 of held-out combinations.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "seed": 0,
      "steps": 3000,
      "batch_size": 32,
      "objective": "decoding",
      "objective_args": {"drop": 0.1, "noise": 0.3},
      "sampling": {"decoder_steps": 20, "decoder_guidance": 1.0, "decoder_null": "image"},
      "model": {"preset": "micro"},
      "trainable": ("unet/",),
      "init_from": "runs/micro/clip/model",
      "data": {"task": "images", "path": "runs/shapes/contrastive", "image_size": 64, "cache": True},
      "optimizer": {"name": "muon", "learning_rate": 5e-3, "b2": 0.99},
      "schedule": {"name": "cosine_min", "min_ratio": 0.02, "warmup_steps": 200},
      "ema_decay": 0.998,
      "compute_dtype": "float32",
      "save_every": 500,
      "log_every": 20,
    }
  )
