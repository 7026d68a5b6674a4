"""The design study, VAE + flow matching: the DiT draws latents of the VAE, which alone makes pixels of them.

blip3o train --config configs/study_vae_flow.py --workdir runs/study_vae_flow

From start-study, as configs/study_clip_flow.py. The paper (3.3, figure 4): the lowest FID on MJHQ-30k, alignment below
CLIP + flow matching. It names neither the VAE nor the size of the pictures: here SDXL's, 256 pixels, patches of 2 x 2,
so 256 tokens. Not run here at this size.
"""

from ml_collections import ConfigDict
from study_clip_flow import get_config as study_clip_flow


def get_config() -> ConfigDict:
  config = study_clip_flow()
  config.model.overrides = {
    "design": "vae_flow",
    "image_size": 256,
    "dit": {"in_channels": 4, "grid": (32, 32), "patch_size": 2},
  }
  config.components = ("backbone", "queries", "dit", "vae")
  config.data.image_size = 256
  return config
