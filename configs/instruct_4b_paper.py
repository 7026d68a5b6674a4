"""Instruction tuning on BLIP3o-60k, 4B, in the form of the paper: as configs/instruct_8b.py.

blip3o train --config configs/instruct_4b_paper.py --workdir runs/instruct_4b_paper

Rates and batch are the release's, the paper prints none. Not run here at this size.
"""

from instruct_8b import instruct
from ml_collections import ConfigDict
from pretrain_4b_paper import get_config as pretrain_4b_paper


def get_config() -> ConfigDict:
  return instruct(pretrain_4b_paper(), "runs/pretrain_4b_paper/model")
