"""Objectives: pure loss functions, one file each (floor 3).

An objective is a module with

  COMPONENTS: the parts of the model that it touches, and
  loss(params, batch, rng, *, model, cfg) -> (loss_sum, weight, metrics)

`loss_sum / weight` is the loss; the trainer divides once, after accumulation and sharding, so that unequal counts
weigh right. `metrics` are sums too (divided by the same weight). `cfg` is the plain dict `config.objective_args`,
spread over the keyword arguments of the function that does the work. An objective knows no mesh, checkpoint or file.
"""

import importlib
import inspect
import types
from collections.abc import Collection, Mapping
from typing import Any

from blip3o_jax.errors import UserError

NAMES = ("autoencoding", "contrastive", "decoding", "understanding", "generation")


def get(name: str) -> types.ModuleType:
  """The objective module called `name`. Raises UserError for an unknown one."""
  if name not in NAMES:
    raise UserError(f"objective {name!r} is unknown; choose one of {', '.join(NAMES)}")
  return importlib.import_module(f"blip3o_jax.objectives.{name}")


def check(name: str, args: Mapping[str, Any], trained: Collection[str]) -> None:
  """Refuse settings before anything runs: unknown `objective_args`, or what the objective's own `check` refuses.

  Args:
    trained: components of which some parameter trains.

  Raises:
    UserError: see above.
  """
  module = get(name)
  work = getattr(module, "_loss", None)
  given = ("params", "batch", "rng", "model")
  known = [p for p in inspect.signature(work).parameters if p not in given] if work else []
  if unknown := sorted(set(args) - set(known)):
    raise UserError(f"objective_args.{unknown[0]}: {name} has no such setting; it has {', '.join(known) or 'none'}")
  if own := getattr(module, "check", None):
    own(args, trained)
