"""Pretraining for image generation, 4B, in the form of the paper: three rotary axes, grouped queries.

blip3o train --config configs/pretrain_4b_paper.py --workdir runs/pretrain_4b_paper

Starts from start-4b as configs/pretrain_4b.py. The paper: 25 M open pictures and 3 M short captions. It does not print
rates, batch or steps: they are the release's. Not run here at this size.
"""

from ml_collections import ConfigDict
from pretrain_8b_paper import get_config as pretrain_8b_paper


def get_config() -> ConfigDict:
  config = pretrain_8b_paper()
  config.model.preset = "blip3o-4b-paper"
  config.init_from = "start-4b"
  config.data.path = ("data/long-captions", "data/short-captions")
  return config
