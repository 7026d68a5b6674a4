"""What the loader is told about pictures, for each kind of backbone; what reaches the devices and what is counted."""

import jax
import numpy as np
import pytest
import tiny

from blip3o_jax.errors import UserError
from blip3o_jax.training import feed
from blip3o_jax.training.defaults import default_config


def asked_for(monkeypatch, task, backbone):
  """The arguments of the loader."""
  config = default_config()
  config.init_from, config.tokenizer = "", ""
  config.data.task, config.data.path = task, "shards"
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


def test_groups_stay_groups_and_what_only_counts_is_counted():
  def batches():
    flags = {"replaced": np.array([True, False]), "cut": np.array([7, 1]), "names": ["a", "b"]}
    yield {"draw": {"pixels": np.zeros((2, 4), np.uint8)} | flags, "see": {"tokens": np.ones((2, 3), np.int32)} | flags}
    yield {"pixels": np.zeros((2, 4), np.uint8), "replaced": np.array([False, True])}

  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with feed.Prefetch(batches(), sharding) as prefetch:
    batch = next(prefetch)
    assert jax.tree.map(lambda x: x.shape, batch) == {"draw": {"pixels": (2, 4)}, "see": {"tokens": (2, 3)}}
    assert prefetch.counts == {"replaced": 2, "cut": 4}
    assert set(next(prefetch)) == {"pixels"} and prefetch.counts == {"replaced": 3, "cut": 4}
