"""The design study, CLIP + MSE: no DiT; the query states, projected, shall be the CLIP features. The backbone trains.

blip3o train --config configs/study_clip_mse.py --workdir runs/study_clip_mse

From start-study, as configs/study_clip_flow.py. The paper (3.2, 3.3): every run draws nearly the same picture for a
prompt, and alignment lies below flow matching (figure 4). Not run here at this size.
"""

from ml_collections import ConfigDict
from study_clip_flow import get_config as study_clip_flow


def get_config() -> ConfigDict:
  config = study_clip_flow()
  config.objective = "regression"
  config.objective_args = ConfigDict({"prefix_pass": False})
  config.model.overrides = {"design": "clip_mse"}
  config.trainable = ("queries/", "projection/", "backbone/")
  return config
