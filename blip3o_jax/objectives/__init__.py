"""Objectives: pure loss functions, one file each (floor 3).

An objective is a module with

  COMPONENTS: the parts of the model that it touches, and
  loss(params, batch, rng, *, model, cfg) -> (loss_sum, weight, metrics)

`loss_sum / weight` is the loss; the trainer divides once, after accumulation and sharding, so that unequal counts
weigh right. `metrics` are sums too (divided by the same weight). `cfg` is the plain dict `config.objective_args`,
spread over the keyword arguments of the function that does the work. An objective knows no mesh, checkpoint or file.

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

from blip3o_jax.errors import UserError

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


def get(name: str) -> types.ModuleType:
  """The objective module called `name`, or in the file of that path. Raises UserError if there is none."""
  if name in NAMES:
    return importlib.import_module(f"blip3o_jax.objectives.{name}")
  if not name.endswith(".py"):
    raise UserError(f"objective {name!r} is unknown; choose one of {', '.join(NAMES)}, or name a file, my_idea.py")
  if not Path(name).is_file():
    raise UserError(f"objective {name!r}: no such file; give its path from where you are")
  spec = importlib.util.spec_from_file_location(Path(name).stem, name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if missing := [word for word in ("COMPONENTS", "loss") if not hasattr(module, word)]:
    raise UserError(f"objective {name!r} has no {missing[0]}; blip3o_jax/objectives/__init__.py says what one is")
  return module


def at_high_noise(losses: jax.Array, high: jax.Array) -> dict[str, jax.Array]:
  """The metric "mse_high_noise" of losses [B]: their mean where `high` [B], which says whether the condition is used at
  all; 0 where none is. As a sum over the batch, as metrics are."""
  high = high.astype(jnp.float32)
  return {"mse_high_noise": jnp.sum(losses * high) / jnp.maximum(jnp.sum(high), 1.0) * losses.shape[0]}


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
