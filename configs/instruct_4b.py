"""Instruction tuning on BLIP3o-60k, 4B, in the form of the release: as configs/instruct_8b.py.

blip3o train --config configs/instruct_4b.py --workdir runs/instruct_4b

The release: 8 H100, 16 pictures each; then 0.81 on GenEval, 79.36 on DPG, 0.50 on WISE. Not run here at this size.
"""

from instruct_8b import instruct
from ml_collections import ConfigDict
from pretrain_4b import get_config as pretrain_4b


def get_config() -> ConfigDict:
  return instruct(pretrain_4b(), "runs/pretrain_4b/model")
