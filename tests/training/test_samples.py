"""Pictures drawn while a run trains. That they are, and change no loss: test_sharded_step.py."""

import pytest
import sharded
import toy

import blip3o_jax
from blip3o_jax.errors import UserError
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


def test_pictures_that_cannot_be_written_do_not_end_the_training(tmp_path, monkeypatch, capsys):
  """Nor is the step's own time taken for drawing's: its line is there before the pictures are begun."""

  def fail(path, content):
    lines = trainer.metrics.read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, int(path.stem) + 1))
    raise RuntimeError("503 Service Unavailable")

  monkeypatch.setattr(trainer, "open_loader", toy.opening(sharded.batches))
  monkeypatch.setattr(trainer, "export", lambda *args: None)
  monkeypatch.setattr(samples, "write_atomically", fail)
  drawing = {"sampling": {"steps": 1, "decoder_steps": 1, "decoder_guidance": 1.0}, "sample_every": 2, **TOKENIZER}
  trainer.train(sharded.config(steps=2, mesh={"data": 1}, sample_prompts=PROMPTS, **drawing), tmp_path)
  assert "WARNING: samples of step 2 could not be written (503 Service Unavailable)" in capsys.readouterr().out
