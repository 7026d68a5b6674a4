"""The decoder of the SDXL type: its UNet learns to draw pictures of 1024 pixels from their 64 pooled CLIP features.

blip3o train --config configs/decoder_sdxl.py --workdir runs/decoder_sdxl

From start-8b (configs/pretrain_8b.py), which holds Emu2's decoder: so this goes on with it; without `unet` in that
model it begins from nothing. Neither the paper nor the release trains this part or prints how Emu2 did, so rate, batch
and length are ours: 64 pictures on 32 or more chips. Schedule of the noise, null condition and image sizes are
the release's (spec part 6). Not run here at this size; in miniature: configs/micro/decoder.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "seed": 42,
      "steps": 100_000,
      "batch_size": 64,
      "objective": "decoding",
      "objective_args": {"drop": 0.1},
      "model": {"preset": "blip3o-8b"},
      "trainable": ("unet/",),
      "init_from": "start-8b",
      "data": {"task": "images", "path": "data/pictures", "image_size": 1024, "resize": "crop", "workers": 4},
      "optimizer": {"name": "adamw", "learning_rate": 1e-5, "weight_decay": 0.01},
      "schedule": {"name": "constant", "warmup_steps": 1000},
      "clip_norm": 1.0,
      "compute_dtype": "bfloat16",
      "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
      "save_every": 1000,
      "log_every": 5,
    }
  )
