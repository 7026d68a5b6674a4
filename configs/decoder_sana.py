"""The decoder of SigLIP2 + SANA: transformer and connector learn to draw DC-AE latents from 64 features.

blip3o convert --from SIGLIP2_SANA --to start-sana
blip3o train --config configs/decoder_sana.py --workdir runs/decoder_sana

The release (branch Reconstruction): 64 pictures a GPU, some 300 M pictures seen for the weights it gives away; here 32
chips and as many pictures. Its numbers otherwise: AdamW with decay 0.05, gradients clipped at 0.5, 5,000 steps of
warm-up, cosine to 0. Not run here at this size.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "seed": 42,
      "steps": 150_000,
      "batch_size": 64 * 32,
      "objective": "flow_decoding",
      "objective_args": {"drop": 0.1, "times": "discrete"},
      "sampling": {"decoder_steps": 30, "decoder_solver": "dpm++", "decoder_null": "image"},
      "model": {"preset": "blip3o-siglip2-sana"},
      "trainable": ("unet/",),
      "init_from": "start-sana",
      "data": {"task": "images", "path": "data/pictures", "image_size": 512, "resize": "crop", "workers": 4},
      "optimizer": {"name": "adamw", "learning_rate": 1e-4, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.05},
      "schedule": {"name": "cosine", "warmup_steps": 5000},
      "clip_norm": 0.5,
      "compute_dtype": "bfloat16",
      "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
      "save_every": 1000,
      "log_every": 5,
    }
  )
