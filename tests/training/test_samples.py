"""Pictures drawn while a run trains. That they are, and change no loss: test_sharded_step.py."""

import types
from pathlib import Path

import numpy as np
import pytest
import sharded
import toy

import blip3o_jax
from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.sharding.mesh import make_mesh
from blip3o_jax.training import samples, trainer

PROMPTS = ("a red circle",)
TOKENIZER = {"tokenizer": f"{blip3o_jax.__path__[0]}/assets/micro/tokenizer"}


@pytest.mark.parametrize("changes, words", [
  ({"sample_every": 2}, "without sample_prompts"),
  ({"sample_every": 2, "sample_prompts": PROMPTS}, "needs a tokenizer"),
  ({"sample_every": 2, "sample_prompts": (*PROMPTS, " "), **TOKENIZER}, "prompt 1: the prompt is empty"),
  ({"sample_every": 2, "sample_prompts": PROMPTS, "objective": "autoencoding", "trainable": ("vae/",)}, "autoencoding"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused_up_front(tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    trainer.train(sharded.config(steps=2, mesh={"data": 1}, **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_pictures_that_cannot_be_written_do_not_end_the_training(tmp_path, monkeypatch):
  def fail(path, content):
    raise RuntimeError("503 Service Unavailable")

  black = np.zeros((8, 8, 3), np.uint8)  # to compile the samplers takes a minute, and is nothing to this
  monkeypatch.setattr(samples.Model, "generate", lambda model, prompts, **_: [[black] for _ in prompts])
  monkeypatch.setattr(samples, "write_atomically", fail)
  config = sharded.config(steps=2, mesh={"data": 1}, sample_every=2, sample_prompts=PROMPTS)
  model = Blip3o(presets.get(config.model.preset, config.model.to_dict()["overrides"]))
  sampler = samples.Sampler(config, model, make_mesh(), Path(TOKENIZER["tokenizer"]), tmp_path)
  assert sampler.draw(2, {}) == "WARNING: samples of step 2 could not be written (503 Service Unavailable)"


def test_the_time_of_a_step_is_not_taken_for_drawing(tmp_path, monkeypatch):
  """Its line is there before the pictures are begun."""
  seen = []

  def draw(step, params):
    seen.append([line["step"] for line in trainer.metrics.read(tmp_path / "metrics.jsonl")])
    return ""

  toy.install(monkeypatch.setattr)
  monkeypatch.setattr(trainer, "Sampler", lambda *_: types.SimpleNamespace(draw=draw))
  monkeypatch.setattr(trainer, "components_to_draw", lambda *_: ())
  trainer.train(toy.config(steps=4, sample_every=2), tmp_path)
  assert seen == [[1, 2], [1, 2, 3, 4]]
