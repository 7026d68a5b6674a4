"""Objectives: pure loss functions, one file each (floor 3).

An objective is a module with

  COMPONENTS: the parts of the model that it touches, and
  loss(params, batch, rng, *, model, cfg) -> (loss_sum, weight, metrics)

`loss_sum / weight` is the loss; the trainer divides once, after accumulation and sharding, so that unequal counts
weigh right. `metrics` are sums too (divided by the same weight). `cfg` is the plain dict `config.objective_args`,
spread over the keyword arguments of the module's `_loss`, which does the work: what that does not name is refused, and
so is what is of another kind than its default. An objective knows no mesh, checkpoint or file.

It may also have

  check(args, trained): refuses settings that would train wrongly, and
  passes(cfg, shapes, args) -> [models.flops.Pass, ...]: the parts that one example goes through, for a Blip3oConfig and
  a batch of these shapes. The trainer reports the utilisation of the chips from it.

A config names one of these, or a file of its own: `config.objective = "my_idea.py"` (notebooks/new_objective.ipynb).
"""

import importlib
import importlib.util
import inspect
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax.errors import UserError, user_code
from blip3o_jax.models.blip3o import COMPONENTS

NAMES = (
  "autoencoding",
  "contrastive",
  "decoding",
  "flow_decoding",
  "understanding",
  "generation",
  "regression",
  "joint",
)

# What settings may be beside their kind; other numbers are at least 0.
_RANGES = {"drop": (0, 1), "noise": (0, 1), "shift": (0.01, 100)}
_CHOICES = {"times": ("discrete", "continuous")}


def get(name: str) -> types.ModuleType:
  """The objective module called `name`, or in the file of that path. Raises UserError if there is none, or it fails."""
  if name in NAMES:
    return importlib.import_module(f"blip3o_jax.objectives.{name}")
  if not name.endswith(".py"):
    raise UserError(f"objective {name!r} is unknown; choose one of {', '.join(NAMES)}, or name a file, my_idea.py")
  if not Path(name).is_file():
    raise UserError(f"objective {name!r}: no such file; give its path from where you are")
  spec = importlib.util.spec_from_file_location(Path(name).stem, name)
  module = importlib.util.module_from_spec(spec)
  with user_code(name):
    spec.loader.exec_module(module)
  if missing := [word for word in ("COMPONENTS", "loss") if not hasattr(module, word)]:
    raise UserError(f"objective {name!r} has no {missing[0]}; blip3o_jax/objectives/__init__.py says what one is")
  if unknown := sorted(set(module.COMPONENTS) - set(COMPONENTS)):
    raise UserError(f"objective {name!r}: {unknown[0]!r} is no part of the model; there are {', '.join(COMPONENTS)}")
  return module


def at_high_noise(losses: jax.Array, high: jax.Array) -> dict[str, jax.Array]:
  """The metric "mse_high_noise" of losses [B]: their mean where `high` [B], which says whether the condition is used at
  all; 0 where none is. As a sum over the batch, as metrics are."""
  high = high.astype(jnp.float32)
  return {"mse_high_noise": jnp.sum(losses * high) / jnp.maximum(jnp.sum(high), 1.0) * losses.shape[0]}


def check(name: str, args: Mapping[str, Any], trained: Collection[str]) -> None:
  """Refuse settings before anything runs: `objective_args` that are unknown, of another kind than their default or out
  of range, or what the objective's own `check` refuses.

  Args:
    trained: components of which some parameter trains.

  Raises:
    UserError: see above.
  """
  module = get(name)
  work = getattr(module, "_loss", None)
  given = ("params", "batch", "rng", "model")
  parameters = inspect.signature(work).parameters.values() if work else ()
  known = {p.name: p.default for p in parameters if p.name not in given}
  if unknown := sorted(set(args) - set(known)):
    raise UserError(f"objective_args.{unknown[0]}: {name} has no such setting; it has {', '.join(known) or 'none'}")
  for key, value in args.items():
    kind = _kind(known[key])
    if kind in (bool, float, str) and _kind(value) is not kind:
      raise UserError(f"objective_args.{key} is {value!r}; give a {kind.__name__}, such as its default {known[key]!r}")
    if name in NAMES and _kind(value) is float:
      least, most = _RANGES.get(key, (0, float("inf")))
      if not least <= value <= most:  # nan is neither
        raise UserError(f"objective_args.{key} is {value}; take a number from {least} to {most}")
    if name in NAMES and value not in _CHOICES.get(key, (value,)):
      raise UserError(f"objective_args.{key} is {value!r}; choose {' or '.join(_CHOICES[key])}")
  if own := getattr(module, "check", None):
    own(args, trained)


def _kind(value: Any) -> type:
  """Whole numbers are numbers."""
  return float if type(value) is int else type(value)
