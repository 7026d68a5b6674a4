"""Joint training: understanding and generation side by side, language model, projector, queries and DiT all train.

blip3o train --config configs/joint.py --workdir runs/joint

From start-qwen3 (configs/understanding.py). The paper (4.1) compares it with sequential training and leaves it to
future work; the release has it in its Qwen3 branch: both losses added, samples of both kinds mixed by their numbers,
2,048 tokens a row, otherwise the numbers of pretraining. It prints no scores. Here a batch is half of each
(`rows`). Not run here at this size.
"""

from ml_collections import ConfigDict
from pretrain_8b import get_config as pretrain_8b


def get_config() -> ConfigDict:
  config = pretrain_8b()
  generation = {key: value for key, value in config.data.items() if key != "workers"}
  config.objective = "joint"
  config.objective_args = ConfigDict({"drop": 0.1, "understanding_weight": 1.0, "generation_weight": 1.0})
  config.model.preset = "blip3o-qwen3-siglip2"
  config.trainable = ("backbone/text/", "backbone/projector/", "queries/", "dit/")
  config.init_from = "start-qwen3"
  config.data = ConfigDict(
    {
      "workers": 4,
      "groups": {
        "generation": {**generation, "rows": 1},
        "understanding": {
          "task": "conversations",
          "path": "data/conversations.jsonl",
          "max_length": 2048,
          "rows": 1,
        },
      },
    }
  )
  return config
