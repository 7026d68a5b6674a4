"""Instruction tuning on BLIP3o-60k, 8B, in the form of the paper: as configs/instruct_8b.py.

blip3o train --config configs/instruct_8b_paper.py --workdir runs/instruct_8b_paper

The paper: 0.84 on GenEval, 81.60 on DPG, 0.62 on WISE after its own pretraining. Not run here at this size.
"""

from instruct_8b import instruct
from ml_collections import ConfigDict
from pretrain_8b_paper import get_config as pretrain_8b_paper


def get_config() -> ConfigDict:
  return instruct(pretrain_8b_paper(), "runs/pretrain_8b_paper/model")
