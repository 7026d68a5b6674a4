"""Config files and overrides: values take the type of their field, and every slip is one clear line."""

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.training.config import leaves, load_config

FILE = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({
    "steps": 10,
    "data": {
      "name": "run", "cache": True, "limit": None, "sizes": (1, 2), "words": ("a",), "empty": (),
    },
  })
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "x.py"
  path.write_text(FILE)
  return path


@pytest.mark.parametrize(
  ("override", "field", "value"),
  [
    ("--config.steps=25", "steps", 25),
    ("--config.steps=1e3", "steps", 1000),
    ("--config.steps=12345678901234567", "steps", 12345678901234567),  # exact, not through a float
    ("data.name=12", "data.name", "12"),
    ("data.name=none", "data.name", "none"),
    ("data.name=a=b", "data.name", "a=b"),
    ("data.cache=false", "data.cache", False),
    ("data.limit=3", "data.limit", 3),
    ("data.limit=some words", "data.limit", "some words"),
    ("data.sizes=(3, 4, 5)", "data.sizes", (3, 4, 5)),
    ("data.sizes=3,4", "data.sizes", (3, 4)),
    ("data.words=b,c", "data.words", ("b", "c")),
    ("data.empty=7,x", "data.empty", (7, "x")),
    ("data.sizes=none", "data.sizes", None),
    ("--config.optimizer.learning_rate=3", "optimizer.learning_rate", 3.0),  # the file leaves it to the defaults
    ("model.overrides.dit.layers=2", "model.overrides.dit.layers", 2),  # nobody names these but their reader
    ("objective_args.times=continuous", "objective_args.times", "continuous"),
  ],
)
def test_override_takes_the_type_of_the_field(file, override, field, value):
  result = leaves(load_config(file, [override]))[field]
  assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("--config.step=1", ["config.step", "did you mean steps"]),
    ("--config.learning_rate=1", ["did you mean optimizer.learning_rate"]),
    ("--config.optimiser.learning_rate=1", ["did you mean optimizer.learning_rate"]),
    ("--config.mesh.datum=1", ["no such field", "did you mean mesh.data"]),
    ("--config.data=1", ["group", "cache"]),
    ("--config.steps.x=1", ["steps is a value"]),
    ("--config.steps=1.5", ["steps=1.5", "int", "10"]),
    ("--config.steps=inf", ["not of type int"]),
    ("--config.data.cache=maybe", ["bool"]),
    ("--config.data.sizes=a,b", ["tuple"]),
    ("--config.steps", ["no value"]),
    ("--config.steps=none", ["steps is None", "a whole number"]),
    ("--config.mesh.fsdp=none", ["mesh.fsdp is None", "a whole number"]),
    ("--config.seed=-1", ["seed is -1", "at least 0"]),
    ("--config.clip_norm=-1", ["clip_norm is -1.0", "at least 0"]),  # it would climb
    ("--config.optimizer.learning_rate=nan", ["learning_rate is nan", "at least 0"]),
    ("--config.optimizer.b2=1", ["b2 is 1.0", "below 1"]),
    ("--config.schedule.warmup_ratio=3", ["warmup_ratio is 3.0", "at most 1"]),  # percent, was meant
  ],
)
def test_a_slip_is_one_line(file, override, words):
  with pytest.raises(UserError) as caught:
    load_config(file, [override])
  assert "\n" not in str(caught.value)
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (None, ["no config file"]),
    ("x = 1", ["no get_config()"]),
    ("def get_config(:", ["x.py:1"]),
    ("def get_config():\n  return {}", ["dict", "ConfigDict"]),
    ("from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'stepz': 1})", ["stepz"]),
    ("import nothing_of_this_name", ["x.py:1", "ModuleNotFoundError"]),
    *(
      (f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({fields})", words)
      for fields, words in [
        ({"steps": 1e5}, ["config.steps is 100000.0", "a whole number"]),
        ({"tensorboard": 1}, ["config.tensorboard is 1", "True or False"]),
        ({"sample_prompts": "a red circle"}, ["sample_prompts is 'a red circle'", "a tuple of texts"]),  # a letter each
        ({"optimizer": {"learning_rate": "1e-4"}}, ["optimizer.learning_rate is '1e-4'", "a number"]),
        ({"data": "shards"}, ["config.data is 'shards'", "a group of fields"]),
      ]
    ),
  ],
)
def test_a_broken_file_is_one_line(tmp_path, text, words):
  if text is not None:
    (tmp_path / "x.py").write_text(text)
  with pytest.raises(UserError) as caught:
    load_config(tmp_path / "x.py")
  for word in words:
    assert word in str(caught.value)


def test_a_config_may_import_its_neighbour_and_is_locked(file):
  other = file.parent / "y.py"
  other.write_text("import x\n\ndef get_config():\n  config = x.get_config()\n  config.steps = 99\n  return config\n")
  config = load_config(other, ["data.name=z"])
  assert config.steps == 99 and config.data.name == "z"
  with pytest.raises(AttributeError):
    config.stepz = 1


def test_configs_of_one_name_in_two_directories_do_not_mix(tmp_path):
  for name, steps in (("a", 1), ("b", 2)):
    (tmp_path / name).mkdir()
    (tmp_path / name / "base.py").write_text(f"STEPS = {steps}\n")
    (tmp_path / name / "one.py").write_text(
      "from base import STEPS\nfrom ml_collections import ConfigDict\n\n"
      "def get_config():\n  return ConfigDict({'steps': STEPS})\n"
    )
  assert [load_config(tmp_path / name / "one.py").steps for name in "ab"] == [1, 2]
