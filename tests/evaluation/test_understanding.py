"""The adapter for lmms-eval, against its interface as its sources have it (lmms_eval/api/model.py, registry_v2.py)."""

import dataclasses
import subprocess
import sys
import types

import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax.errors import CheckFailed, UserError
from blip3o_jax.evaluation import understanding

RED, GRAY = Image.new("RGB", (24, 24), (200, 30, 20)), Image.new("RGB", (24, 24), (128, 128, 128))


@dataclasses.dataclass
class Request:
  """lmms_eval.api.instance.Instance: all that an adapter reads of it."""

  args: tuple


@pytest.fixture
def lmms_eval(monkeypatch):
  """The two names that are imported, as in lmms-eval."""

  class Lmms:
    is_simple = True

    def __init__(self):
      self.task_dict, self.noted = {}, []
      self.cache_hook = types.SimpleNamespace(add_partial=lambda *args: self.noted.append(args))

    @classmethod
    def create_from_arg_string(cls, text, extra=None):
      pairs = dict(pair.split("=", 1) for pair in text.split(","))
      return cls(**pairs, **{k: v for k, v in (extra or {}).items() if v is not None})

  @dataclasses.dataclass
  class ModelManifest:
    model_id: str
    simple_class_path: str | None = None

  modules = {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {}}
  modules |= {"lmms_eval.api.model": {"lmms": Lmms}, "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest}}
  for name, content in modules.items():
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))


def test_it_is_found_and_answers(lmms_eval, tiny_directory):
  manifest = understanding.manifest()
  module, _, name = manifest.simple_class_path.rpartition(".")
  adapter = getattr(sys.modules[module], name)
  lm = adapter.create_from_arg_string(
    f"pretrained={tiny_directory},min_pixels=256,max_pixels=1024", {"batch_size": 2, "device": None}
  )
  assert manifest.model_id == "blip3o_jax" and lm.is_simple and lm.batch_size == 2
  docs = [{"image": RED}, {"image": GRAY}, {"image": None}]
  lm.task_dict["shapes"] = {"test": docs}
  visual = lambda doc: [doc["image"]] if doc["image"] else None
  given = [{"max_new_tokens": 5}, {"max_new_tokens": 5, "until": ["\n\n"]}, {"max_new_tokens": 5, "temperature": 0}]
  questions = ["<image>what is it?", "what colour?", "what is red?"]
  requests = [
    Request((question, settings, visual, i, "shapes", "test"))
    for i, (question, settings) in enumerate(zip(questions, given, strict=True))
  ]
  answers = lm.generate_until(requests)
  ask = lambda *content, n: lm.model.chat([{"role": "user", "content": list(content)}], max_new_tokens=n)
  assert answers == [ask(RED, "what is it?", n=5), ask(GRAY, "what colour?", n=5), ask("what is red?", n=5)]
  assert lm.noted[1] == ("generate_until", requests[1].args[:2], answers[1])
  assert len(answers[0]) > 2
  cut = Request(("what is it?", {"max_new_tokens": 5, "until": [answers[0][2]]}, visual, 0, "shapes", "test"))
  assert lm.generate_until([cut]) == [answers[0].split(answers[0][2])[0]]
  with pytest.raises(UserError, match="choose tasks that generate"):
    lm.loglikelihood(requests)
  with pytest.raises(UserError, match="'colour' is unknown"):
    adapter.create_from_arg_string(f"pretrained={tiny_directory},colour=1")


def test_the_command(lmms_eval, monkeypatch):
  called = []
  monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
  monkeypatch.setattr(subprocess, "run", lambda words: called.append(words) or types.SimpleNamespace(returncode=0))
  understanding.run("DIR", "mme,mmmu_val", limit=5)
  words = ["--model", "blip3o_jax", "--model_args", "pretrained=DIR", "--tasks", "mme,mmmu_val", "--batch_size", "16"]
  assert called == [[sys.executable, "-m", "lmms_eval", *words, "--limit", "5"]]
  understanding.run("DIR", "mme", fsdp=4)  # a model too large for one device
  assert "pretrained=DIR,fsdp=4" in called[1]
  monkeypatch.setattr(subprocess, "run", lambda words: types.SimpleNamespace(returncode=3))
  with pytest.raises(CheckFailed, match="status 3"):
    understanding.run("DIR", "mme")
  monkeypatch.undo()
  with pytest.raises(UserError, match="lmms-eval is not installed"):
    understanding.run("DIR", "mme")


def test_nothing_is_imported_early():
  with pytest.raises(AttributeError, match="no attribute 'Other'"):
    understanding.Other  # noqa: B018
  assert "lmms_eval" not in sys.modules and blip3o_jax
