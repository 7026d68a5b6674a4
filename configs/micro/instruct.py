"""The miniature, stage 6 of 6: instruction tuning on a small set balanced over the six families (BLIP3o-60k's part).

blip3o train --config configs/micro/instruct.py --workdir runs/micro/instruct
"""

from generation import get_config as pretraining
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = pretraining()
  config.steps = 150
  config.init_from = "runs/micro/generation/model"
  config.data.path = "runs/shapes/instruct"
  config.optimizer.learning_rate = 1e-3
  config.schedule = ConfigDict({"name": "cosine", "warmup_steps": 20})
  return config
