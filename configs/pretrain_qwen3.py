"""Generation, the second stage of sequential training: as configs/pretrain_8b.py, on the Qwen3 that has learnt to see.

blip3o train --config configs/pretrain_qwen3.py --workdir runs/pretrain_qwen3

The backbone of configs/understanding.py stays as it is; queries and DiT learn. The release's branch prints no scores,
and no weights of it are public. Not run here at this size.
"""

from ml_collections import ConfigDict
from pretrain_8b import get_config as pretrain_8b


def get_config() -> ConfigDict:
  config = pretrain_8b()
  config.model.preset = "blip3o-qwen3-siglip2"
  config.init_from = "runs/understanding/model"
  return config
