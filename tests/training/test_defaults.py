"""The fields of an experiment, and who may use a working directory."""

import json

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.training.defaults import claim, complete, default_config


def test_unknown_fields_are_refused():
  config = default_config()
  config.optimiser = {"name": "adamw"}
  with pytest.raises(UserError, match="optimiser"):
    complete(config)
  config = default_config()
  config.schedule.warm_up = 3
  with pytest.raises(UserError, match="schedule.warm_up"):
    complete(config)
  config = default_config()
  config.model.dit = {"layers": 2}  # meant for model.overrides
  with pytest.raises(UserError, match="config.model.dit is read by nothing"):
    complete(config)


def test_missing_fields_get_defaults_and_ranges_hold():
  from ml_collections import ConfigDict

  full = complete(ConfigDict({"optimizer": {"learning_rate": 3e-4}, "data": {"kind": "shapes"}}))
  assert full.optimizer.b1 == 0.9 and full.optimizer.learning_rate == 3e-4 and full.data.kind == "shapes"
  for field, value in [("steps", 0), ("accumulate", 3), ("ema_decay", 1.0), ("compute_dtype", "int8")]:
    config = default_config()
    config[field] = value
    with pytest.raises(UserError, match=field.removesuffix("ulate")):
      complete(config)


def test_claim(tmp_path):
  config = default_config()
  claim(tmp_path / "new", config, write=False)
  assert not (tmp_path / "new").exists()
  claim(tmp_path / "new", config, write=True)
  assert json.loads((tmp_path / "new/config.json").read_text())["trainable"] == ["dit/", "queries/"]
  config.log_every, config.save_every, config.keep = 7, 8, 9
  config.mesh.fsdp, config.remat, config.data.workers, config.data.threads = 4, "dots", 16, 2
  assert claim(tmp_path / "new", config, write=True) == ""
  config.optimizer.learning_rate = 0.5
  assert claim(tmp_path / "new", config, write=False) == "optimizer.learning_rate was 0.0001, is 0.5"
  config.optimizer.b1, config.steps = 0.5, 77
  with pytest.raises(UserError, match=r"optimizer.b1 was 0.9, is 0.5; steps was 150000, is 77") as error:
    claim(tmp_path / "new", config, write=True)
  assert "\n" not in str(error.value)
  assert json.loads((tmp_path / "new/config.json").read_text())["log_every"] == 7
