"""Experiment files: a Python file with `get_config()`, and `--config.field=value` on top of it."""

import ast
import difflib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from blip3o_jax.errors import UserError, user_code
from blip3o_jax.training.defaults import OPEN, complete

_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> ConfigDict:
  """Run `get_config()` of a config file, add the defaults, apply overrides `[--config.]a.b=value`, and lock.

  A value is read as the type the field already has: bool, int, float, str, tuple or list (Python syntax, or values
  with commas between, each of the type of the first). `none` clears a field that is no string; a field that is None, or
  left out of an open group by the file (`model.overrides.dit.layers=2`), takes any Python literal, or else the text.

  Returns: a locked ConfigDict with every field of `training.defaults`.
  Raises: UserError for a missing or broken file, an unknown field (naming close ones) or a value that it cannot have.
  """
  config = complete(_run(Path(path)))  # with the defaults, so that a field the file leaves out can be set too
  for override in overrides:
    name, equals, text = override.removeprefix("--").removeprefix("config.").partition("=")
    if not equals:
      raise UserError(f"--config.{name} has no value: write --config.{name}=VALUE")
    _override(config, name, text)
  return complete(config).lock()


def _run(path: Path) -> ConfigDict:
  if not path.is_file():
    raise UserError(f"no config file at {path}; give the path of one, such as configs/micro/generation.py")
  spec = importlib.util.spec_from_file_location(f"blip3o_config_{path.stem}", path)
  if spec is None:
    raise UserError(f"{path} is not a Python file; a config is a .py file with get_config()")
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str(path.parent.resolve()))  # a config may import the one beside it that it varies
  before = set(sys.modules)
  try:
    with user_code(path):
      spec.loader.exec_module(module)
      if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} has no get_config(); a config is a .py file that defines it")
      config = module.get_config()
  finally:
    sys.path.remove(str(path.parent.resolve()))
    for name in set(sys.modules) - before:  # another directory may have a config of the same name
      if Path(getattr(sys.modules[name], "__file__", None) or "").parent == path.parent.resolve():
        del sys.modules[name]
  if not isinstance(config, ConfigDict):
    raise UserError(f"get_config() of {path} returned {type(config).__name__}, not an ml_collections.ConfigDict")
  return config


def _override(config: ConfigDict, name: str, text: str) -> None:
  *groups, leaf = name.split(".")
  node = config
  for depth, key in enumerate([*groups, leaf]):
    if not isinstance(node, ConfigDict):
      raise UserError(f"--config.{name}: {'.'.join(groups[:depth])} is a value, it has no fields")
    if key not in node and groups[:1] and groups[0] in OPEN:  # its reader knows what there may be
      with node.unlocked():
        node[key] = None if depth == len(groups) else ConfigDict()
    if key not in node:
      # By the last word alone: a field given without its group is the commonest slip.
      last = lambda path: path.rsplit(".", 1)[-1]
      similar = difflib.get_close_matches(leaf, {last(path) for path in leaves(config)})
      close = sorted((path for path in leaves(config) if last(path) in similar), key=lambda p: similar.index(last(p)))
      hint = f"did you mean {' or '.join(close)}?" if close else f"here are {', '.join(sorted(node))}"
      raise UserError(f"--config.{name}: no such field; {hint}")
    node, parent = node[key], node
  if isinstance(node, ConfigDict):
    raise UserError(f"--config.{name} is a group; set one of its fields: {', '.join(sorted(node))}")
  kind = parent.get_type(leaf)
  try:
    value = _parse(text, node, kind)
  except (ValueError, SyntaxError, TypeError, OverflowError) as error:
    raise UserError(f"--config.{name}={text}: not of type {kind.__name__} (it is {node!r} in the file)") from error
  with parent.ignore_type():  # _parse has seen to the type; a tuple for a list, or None, is meant
    parent[leaf] = value


def _parse(text: str, current: Any, kind: type) -> Any:
  if kind is str:
    return text
  if text.lower() == "none":
    return None
  if kind is bool:
    if text.lower() not in _BOOLS:
      raise ValueError(text)
    return _BOOLS[text.lower()]
  if kind is int:
    if (value := float(text)) != int(value):  # 1e6 is a fine step count, 1.5 is not
      raise ValueError(text)
    return int(text) if text.lstrip("+-").isdigit() else int(value)
  if kind is float:
    return float(text)
  if kind in (tuple, list):
    if text[:1] in ("(", "["):
      values = ast.literal_eval(text)
    else:
      one = current[0] if current else None
      values = [_parse(part.strip(), one, type(one)) for part in text.split(",") if part.strip()]
    if not isinstance(values, tuple | list):
      raise ValueError(text)
    return kind(values)
  if kind is type(None):
    try:
      return ast.literal_eval(text)
    except (ValueError, SyntaxError):
      return text
  raise TypeError(f"fields of type {kind.__name__} cannot be set from the command line")


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
  """Every field of a config that is not a group: {"optimizer.learning_rate": 1e-4, ...}."""
  found = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      found |= leaves(value, f"{prefix}{key}.")
    else:
      found[f"{prefix}{key}"] = value
  return found
