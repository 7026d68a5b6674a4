"""Pretraining for image generation, 8B, in the form of the paper: three rotary axes, grouped queries.

blip3o train --config configs/pretrain_8b_paper.py --workdir runs/pretrain_8b_paper

Starts from start-8b as configs/pretrain_8b.py. The paper: 25 M open pictures, 30 M of its own and 6 M short captions;
then 0.84 on GenEval, 81.60 on DPG and 0.62 on WISE after instruction tuning. It does not print rates, batch or steps:
they are the release's. Not run here at this size.
"""

from ml_collections import ConfigDict
from pretrain_8b import get_config as pretrain_8b


def get_config() -> ConfigDict:
  config = pretrain_8b()
  config.model.preset = "blip3o-8b-paper"
  config.objective_args.times = "continuous"
  config.data.path = ("data/long-captions", "data/proprietary", "data/short-captions")
  config.data.wording = "paper"
  config.data.form = "inference"  # what it will be asked with; the release's two tokens more are a slip (spec 14)
  return config
