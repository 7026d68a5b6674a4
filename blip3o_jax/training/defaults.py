"""Every field of an experiment and its default: the release's pre-training recipe (spec 11.1)."""

import dataclasses
import json
import math
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from blip3o_jax.data.outputs import differences, write_atomically
from blip3o_jax.data.pipeline import Reading
from blip3o_jax.errors import UserError

# Fields whose value is for their readers to check.
OPEN = ("model", "objective_args", "data", "sampling")

# What may differ between two runs in one working directory: it changes nothing that is computed, or, as where it is
# computed, only the order of sums.
_FREE = (
  *("log_every", "save_every", "keep", "tensorboard", "sample_every", "sample_prompts", "profile"),
  *("mesh", "remat", "max_bad_steps"),
  *(f"data.{field.name}" for field in dataclasses.fields(Reading)),
)

# What may be changed as well, to go on after a loss that did not stay finite; it is told.
_MENDED = ("optimizer.learning_rate", "clip_norm")

# By the type of its default what a field may be, and the words for it.
_KINDS = {
  bool: (bool, "True or False"),
  int: (int, "a whole number"),
  float: ((int, float), "a number"),
  str: (str, "a text"),
  tuple: ((tuple, list), "a tuple of texts"),
}

# The least and the most that a number may be; those of _BELOW_ONE must stay below 1.
_BELOW_ONE = ("ema_decay", "optimizer.b1", "optimizer.b2")
_FROM_ONE = ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep", "max_bad_steps")
_FROM_NONE = (
  *("sample_every", "profile", "clip_norm", "schedule.warmup_steps"),
  *("optimizer.learning_rate", "optimizer.eps", "optimizer.weight_decay"),
)
_LIMITS = {
  "seed": (0, 2**32 - 1),  # what Grain and JAX both take
  **dict.fromkeys(_FROM_ONE, (1, math.inf)),
  **dict.fromkeys(_FROM_NONE, (0, math.inf)),
  **dict.fromkeys(("schedule.warmup_ratio", "schedule.min_ratio", *_BELOW_ONE), (0, 1)),
}


def default_config() -> ConfigDict:
  """A config with every field the trainer reads; an experiment changes what it needs."""
  config = ConfigDict()
  config.seed = 42
  config.steps = 150_000
  config.batch_size = 512  # global, over all devices and all accumulated parts
  config.accumulate = 1  # parts of a batch that go through the model one after the other

  config.objective = "generation"
  config.objective_args = {}
  config.model = {"preset": "micro", "overrides": {}}
  config.components = ()  # what to load; () = what the objective names
  config.trainable = ("dit/", "queries/")  # regular expressions from the start of "component/path"
  config.init_from = ""  # a model directory
  config.tokenizer = ""  # a folder with tokenizer.json; "" = that of init_from
  config.data = {}  # fields of data.builders.DataConfig and data.pipeline.Reading

  config.optimizer = {
    "name": "adamw",
    "learning_rate": 1e-4,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
  }
  config.schedule = {"name": "cosine_min", "min_ratio": 0.1, "warmup_steps": 0, "warmup_ratio": 0.003}
  config.clip_norm = 1.0
  config.ema_decay = 0.0  # 0 = off
  config.compute_dtype = "bfloat16"
  config.max_bad_steps = 20  # non-finite steps in a row before the run gives up
  config.mesh = {"slice": 0, "data": -1, "fsdp": 1, "tensor": 1}  # see sharding.mesh.make_mesh
  config.remat = ""  # none | full | dots (nn.stack) for every stack; "" = each as its preset says

  config.log_every = 50
  config.save_every = 1000
  config.keep = 1
  config.tensorboard = False
  config.sample_every = 0  # steps between pictures in WORKDIR/samples; 0 = none
  config.sample_prompts = ()
  config.profile = 0  # steps to trace into WORKDIR/profile, from the third of this start on
  config.sampling = {}  # defaults for drawing that the finished model directory carries (inference.image.Sampling)
  config.export = "safetensors"  # format of WORKDIR/model: safetensors | orbax
  return config


def complete(config: ConfigDict) -> ConfigDict:
  """`config` on top of the defaults, frozen.

  Raises:
    UserError: a field that nothing reads, a value of another type than the default, or a number out of range.
  """
  full = default_config()
  for key, value in config.items():
    if key not in full:
      raise UserError(f"config.{key} is read by nothing; the fields are {', '.join(sorted(full))}")
    if isinstance(full[key], ConfigDict):
      if not isinstance(value, ConfigDict):
        raise UserError(f"config.{key} is {value!r}; it is a group of fields, give a dict of them")
      if unknown := sorted(set(value) - set(full[key])) if key not in OPEN else []:
        raise UserError(f"config.{key}.{unknown[0]} is read by nothing; there are {', '.join(sorted(full[key]))}")
      value = ConfigDict({**full[key], **value})
    with full.ignore_type():
      full[key] = value
  if unknown := sorted(set(full.model) - {"preset", "overrides"}):
    raise UserError(f"config.model.{unknown[0]} is read by nothing; sizes are set under config.model.overrides")
  values = _flat(full.to_dict())
  for key, default in _flat(default_config().to_dict()).items():
    if key.split(".")[0] not in OPEN:
      _check(key, values[key], default)
  if full.batch_size % full.accumulate:
    raise UserError(
      f"batch_size {full.batch_size} does not divide into {full.accumulate} accumulated parts; take a multiple of them"
    )
  if full.compute_dtype not in ("float32", "bfloat16"):
    raise UserError(f"compute_dtype {full.compute_dtype!r} is unknown; choose bfloat16 or float32")
  if full.export not in ("safetensors", "orbax"):
    raise UserError(f"export {full.export!r} is unknown; choose safetensors or orbax")
  return full


def _check(key: str, value: Any, default: Any) -> None:
  kind, words = _KINDS[type(default)]
  texts = not isinstance(default, tuple) or (isinstance(value, kind) and all(isinstance(x, str) for x in value))
  if not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool) or not texts:
    raise UserError(f"config.{key} is {value!r}; give {words}")
  if key in _LIMITS:
    least, most = _LIMITS[key]
    if not least <= value <= most or (key in _BELOW_ONE and value == 1):  # nan is neither
      upper = " and below 1" if key in _BELOW_ONE else f" and at most {most}" * math.isfinite(most)
      raise UserError(f"config.{key} is {value}; it must be at least {least}{upper}")


def claim(workdir: epath.Path, config: ConfigDict, *, write: bool) -> str:
  """Leave `config` in WORKDIR/config.json, or check that the one there is the same up to logging and saving.

  Returns: what differs and may; empty if nothing does.

  Raises:
    UserError: the directory belongs to another config (naming the fields that differ).
  """
  path = workdir / "config.json"
  ours, changed = config.to_dict(), {}
  if path.exists():
    differing = differences(_flat(json.loads(path.read_text())), _flat(ours))
    changed = {key: words for key, words in differing.items() if not {key, key.split(".")[0]} & set(_FREE)}
    if refused := "; ".join(words for key, words in changed.items() if key not in _MENDED):
      raise UserError(f"{workdir} was made by another config ({refused}); give another --workdir or the old values")
  if write:
    write_atomically(path, (json.dumps(ours, indent=2, sort_keys=True) + "\n").encode())
  return "; ".join(changed.values())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      flat |= _flat(value, f"{prefix}{key}.")
    elif value != {}:
      flat[f"{prefix}{key}"] = value
  return flat
