"""Understanding, the first of two stages of sequential training: Qwen3 learns to see through SigLIP2.

blip3o convert --from Qwen/Qwen3-1.7B EVA_CLIP.safetensors RELEASE/diffusion-decoder \
  google/siglip2-so400m-patch16-512 --to start-qwen3
blip3o train --config configs/understanding.py --workdir runs/understanding

The paper starts from Qwen2.5-VL and skips this stage; the release has it in its Qwen3 branch, whose rates these are
(those of pretraining, 2,048 tokens a row, 10 passes), both towers frozen, the language model and the projector
training. No weights of it are public, and it prints no scores. Not run here at this size. Generation comes after:
configs/pretrain_qwen3.py.
"""

from ml_collections import ConfigDict
from pretrain_8b import get_config as pretrain_8b


def get_config() -> ConfigDict:
  config = pretrain_8b()
  config.objective = "understanding"
  config.objective_args = ConfigDict()
  config.model.preset = "blip3o-qwen3-siglip2"
  config.trainable = ("backbone/text/", "backbone/projector/")
  config.init_from = "start-qwen3"
  config.data = ConfigDict(
    {"task": "conversations", "path": "data/conversations.jsonl", "max_length": 2048, "workers": 4}
  )
  return config
