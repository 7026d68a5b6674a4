"""What a training run carries from step to step, and the split into trained and frozen parameters."""

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from blip3o_jax.errors import UserError
from blip3o_jax.types import Params


@struct.dataclass
class TrainState:
  """All that a checkpoint holds. Frozen parameters are not here: they come from `init_from` again.

  `trained`, `ema` are {component: tree} in float32; `ema` is empty when it is off. `step` counts batches consumed,
  `skipped` the updates left out for a non-finite loss or gradient, `skipped_in_row` those after the last good one.
  """

  step: jax.Array
  trained: Params
  opt_state: optax.OptState
  ema: Params
  skipped: jax.Array
  skipped_in_row: jax.Array


def create(trained: Params, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
  """A fresh state. Works on boxed parameters as well (under `jax.eval_shape`), and then gives boxed ones."""
  trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
  zero = jnp.zeros((), jnp.int32)
  copy = jax.tree.map(jnp.copy, trained) if ema else {}  # a copy: donated buffers must not be shared
  return TrainState(zero, trained, optimizer.init(trained), copy, zero.copy(), zero.copy())


def split(params: Params, trainable: Sequence[str]) -> tuple[Params, Params]:
  """Part {component: tree} into (trained, frozen) by regular expressions that match from the start of "component/path".

  Raises:
    UserError: an expression matches nothing, or is none.
  """
  leaves = flatten_dict(dict(params))
  names = {key: "/".join(key) for key in leaves}
  chosen: set[tuple[str, ...]] = set()
  for pattern in trainable:
    try:
      hits = {key for key, name in names.items() if re.match(pattern, name)}
    except re.error as error:
      raise UserError(f"trainable: {pattern!r} is no regular expression ({error})") from error
    if not hits:
      raise UserError(f"trainable: {pattern!r} matches no parameter; components are {', '.join(sorted(params))}")
    chosen |= hits
  if not chosen:
    raise UserError("trainable is empty: name what trains, e.g. ('dit/', 'queries/')")
  pick = lambda keep: unflatten_dict({key: leaf for key, leaf in leaves.items() if (key in chosen) == keep})
  return pick(True), pick(False)


def merge(trained: Params, frozen: Params) -> Params:
  """The inverse of `split`."""
  return unflatten_dict(flatten_dict(dict(trained)) | flatten_dict(dict(frozen)))


def cast(params: Params, dtype: Any) -> Params:
  """Floating leaves in another dtype (through boxes too)."""
  return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def count(params: Params) -> int:
  """Number of scalars in a tree of arrays or shapes."""
  return sum(x.size for x in jax.tree.leaves(nn.unbox(params)))


def overview(trained: Params, frozen: Params) -> str:
  """One line a component: how many parameters train and how many are frozen."""
  lines = []
  for name in sorted({*trained, *frozen}):
    lines.append(f"  {name:<12} {count(trained.get(name, {})):>15,} trained {count(frozen.get(name, {})):>15,} frozen")
  lines.append(f"  {'all':<12} {count(trained):>15,} trained {count(frozen):>15,} frozen")
  return "\n".join(lines)
