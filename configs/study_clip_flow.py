"""The design study, CLIP + flow matching, the paper's choice: queries and DiT on a frozen Llama-3.2-1B.

blip3o convert --from meta-llama/Llama-3.2-1B-Instruct EVA_CLIP.safetensors RELEASE/diffusion-decoder --to start-study
blip3o train --config configs/study_clip_flow.py --workdir runs/study_clip_flow

The paper (3.3, figure 4): the best of the three on GenEval and DPG, scored every 3,200 steps or so. 25 M pictures with
detailed captions (LLaVA's; JourneyDB's own). It prints no rates, batch or hardware: they are those of the release's
pretraining. Not run here at this size.
"""

from ml_collections import ConfigDict
from pretrain_8b_paper import get_config as pretrain_8b_paper


def get_config() -> ConfigDict:
  config = pretrain_8b_paper()
  config.model.preset = "blip3o-study"
  config.init_from = "start-study"
  config.data.path = ("data/cc12m-llava", "data/sa1b-llava", "data/journeydb")
  config.save_every = 3200
  return config
