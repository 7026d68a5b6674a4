"""The miniature, stage 3 of 6: the CLIP-conditioned diffusion decoder (the release takes Emu2's).

blip3o train --config configs/micro/decoder.py --workdir runs/micro/decoder

The bundled model, on a corpus without unnamed colours, 2026-11-21: 2533 s on one core (AMD EPYC). Drawn again from
their own features 0.906 of 192 pictures are right, and 0.682 of 192 of held-out combinations. With 800, 1500 and 4000 more
steps of VAE, CLIP and decoder on the corpus as it is now (2026-11-29; 3900 s for the decoder on one core of an Intel
Xeon, other work beside it) it was 0.911 and 0.859; that model is not bundled, since its DiT was not trained to the end.
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
