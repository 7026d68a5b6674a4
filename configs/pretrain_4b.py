"""Pretraining for image generation, 4B, in the form of the release: as configs/pretrain_8b.py, on Qwen2.5-VL-3B.

blip3o convert --from Qwen/Qwen2.5-VL-3B-Instruct EVA_CLIP.safetensors RELEASE/diffusion-decoder --to start-4b
blip3o train --config configs/pretrain_4b.py --workdir runs/pretrain_4b

The release: 32 H200, 16 pictures each, about ten days; then 0.81 on GenEval and 79.36 on DPG after instruction tuning
(configs/instruct_4b.py). Not run here at this size.
"""

from ml_collections import ConfigDict
from pretrain_8b import get_config as pretrain_8b


def get_config() -> ConfigDict:
  config = pretrain_8b()
  config.model.preset = "blip3o-4b"
  config.init_from = "start-4b"
  return config
