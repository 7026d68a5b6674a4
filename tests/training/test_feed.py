"""What the loader is told about pictures, for each kind of backbone."""

import pytest
import tiny

from blip3o_jax.errors import UserError
from blip3o_jax.training import feed
from blip3o_jax.training.defaults import default_config


def asked_for(monkeypatch, task, backbone):
  """The arguments of the loader."""
  config = default_config()
  config.init_from, config.tokenizer = "", ""
  config.data.task = task
  monkeypatch.setattr(feed.pipeline, "make_loader", lambda data, **arguments: arguments)
  return feed.open_loader(config, tiny.config(**tiny.BACKBONES[backbone]), 0)


def test_the_tower_of_qwen_says_how_pictures_are_cut(monkeypatch):
  asked = asked_for(monkeypatch, "conversations", "qwen2_5_vl")
  vision = tiny.config().backbone.vision
  assert (asked["window_size"], asked["processor"].patch_size) == (vision.window_size, vision.patch_size)


@pytest.mark.parametrize("backbone", ["qwen3_siglip", "llama"])
def test_other_backbones_learn_to_draw_but_not_from_conversations(monkeypatch, backbone):
  assert "processor" not in asked_for(monkeypatch, "generation", backbone)
  with pytest.raises(UserError, match="Qwen2.5-VL's tower alone"):
    asked_for(monkeypatch, "conversations", backbone)
