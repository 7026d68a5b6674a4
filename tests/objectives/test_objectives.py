"""What every objective shares: its name, its components, and the refusal of settings that mean nothing."""

import pytest

from blip3o_jax import objectives
from blip3o_jax.errors import UserError
from blip3o_jax.models.blip3o import COMPONENTS


@pytest.mark.parametrize("name", objectives.NAMES)
def test_every_objective_names_its_components(name):
  module = objectives.get(name)
  assert callable(module.loss) and set(module.COMPONENTS) <= set(COMPONENTS)
  objectives.check(name, {}, ())


def test_unknown_objective_and_setting():
  with pytest.raises(UserError, match="'drawing' is unknown; choose one of autoencoding"):
    objectives.get("drawing")
  with pytest.raises(UserError, match="objective_args.dorp: generation has no such setting; it has drop"):
    objectives.check("generation", {"dorp": 0.1}, ("dit",))
  with pytest.raises(UserError, match="understanding has no such setting; it has none"):
    objectives.check("understanding", {"drop": 0.1}, ("backbone",))


@pytest.mark.parametrize("name, args, words", [
  ("generation", {"drop": 10}, "drop is 10; take a number from 0 to 1"),  # percent, was meant
  ("generation", {"drop": float("nan")}, "drop is nan"),
  ("generation", {"shift": 0.0}, "shift is 0.0"),
  ("generation", {"times": "discreet"}, "times is 'discreet'; choose discrete or continuous"),
  ("generation", {"prefix_pass": "no"}, "prefix_pass is 'no'; give a bool"),
  ("decoding", {"noise": None}, "noise is None; give a float"),
  ("joint", {"generation_weight": -1}, "generation_weight is -1"),
])  # fmt: skip
def test_settings_that_would_train_wrongly(name, args, words):
  with pytest.raises(UserError, match=words):
    objectives.check(name, args, ("dit",))


def test_a_backbone_that_trains_needs_the_plain_pass():
  with pytest.raises(UserError, match="prefix_pass to False"):
    objectives.check("generation", {"drop": 0.1}, ("backbone", "dit"))
  objectives.check("generation", {"prefix_pass": False}, ("backbone", "dit"))


def test_an_objective_of_ones_own_is_a_file(tmp_path):
  file = tmp_path / "idea.py"
  file.write_text("COMPONENTS = ('dit',)\n\n\ndef loss(params, batch, rng, *, model, cfg):\n  return 1.0, 2.0, {}\n")
  assert objectives.get(str(file)).loss(None, None, None, model=None, cfg={}) == (1.0, 2.0, {})
  file.write_text("COMPONENTS = ('dit',)\n")
  with pytest.raises(UserError, match="idea.py' has no loss"):
    objectives.get(str(file))
  for text, words in [
    ("def loss(:", "idea.py:1: invalid syntax"),
    ("import jax\n1 / 0\n", "idea.py failed at .*idea.py:2: ZeroDivisionError"),
    ("COMPONENTS = ('ditt',)\ndef loss(): pass\n", "'ditt' is no part of the model; there are backbone"),
  ]:
    file.write_text(text)
    with pytest.raises(UserError, match=words):
      objectives.get(str(file))
  file.write_text("COMPONENTS = ('dit',)\ndef loss(): pass\ndef _loss(*, model, eps, drop=0.1, rate=-1): pass\n")
  objectives.check(str(file), {"eps": None, "drop": 10, "rate": -2.5}, ("dit",))  # ranges are its own business
  with pytest.raises(UserError, match="other.py': no such file"):
    objectives.get(str(tmp_path / "other.py"))
