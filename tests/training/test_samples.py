"""Pictures drawn while a run trains. That they are, and change no loss: test_sharded_step.py."""

import pytest
import sharded

from blip3o_jax.errors import UserError
from blip3o_jax.training import trainer

PROMPTS = ("a red circle",)


@pytest.mark.parametrize("changes, words", [
  ({"sample_every": 2}, "without sample_prompts"),
  ({"sample_every": 2, "sample_prompts": PROMPTS}, "needs a tokenizer"),
  ({"sample_every": 2, "sample_prompts": PROMPTS, "objective": "autoencoding", "trainable": ("vae/",)}, "autoencoding"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused_up_front(tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    trainer.train(sharded.config(steps=2, mesh={"data": 1}, **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()
