"""From the name of a model to the model: bundled, a directory, a bucket, the hub (floor 3)."""

import functools
import importlib.resources
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from etils import epath

from blip3o_jax.data.files import reading
from blip3o_jax.errors import UserError
from blip3o_jax.porting import assemble, model_dir, release
from blip3o_jax.porting.source import TOKENIZER_FILES, Source

BUNDLED = ("micro",)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a model is made of; nothing that could be code is fetched.
_FETCHED = ("*.safetensors", "*.safetensors.index*.json", "*config.json", model_dir.MANIFEST, "preprocessor.json")


def open_model(name: os.PathLike | str) -> Source:
  """The model behind a bundled name ("micro"), a path (local or gs://) to a model directory or to the release's layout,
  or a hub id ("BLIP3o/BLIP3o-Model-8B"), which is fetched once; HF_ENDPOINT and HF_HOME are the hub's own settings.

  Raises:
    UserError: there is no such model, or what is wrong with it.
  """
  path = find(name)
  if (path / model_dir.MANIFEST).exists():
    return model_dir.open_directory(path, os.fspath(name))
  return release.open_release(path, os.fspath(name))


def open_models(names: Sequence[os.PathLike | str]) -> Source:
  """The models behind several names as one: every part from the first of them that has it, its sizes with it; all else
  from the first (see assemble.join).

  Raises:
    UserError: as `open_model`.
  """
  return functools.reduce(assemble.join, [open_model(name) for name in names])


def convert_model(
  name: os.PathLike | str | Sequence[os.PathLike | str],
  directory: os.PathLike | str,
  *,
  format: str | None = None,
  part: str | None = None,
  dtype: Any = None,
) -> list[str]:
  """Write a model in another layout; no array but the one at hand is in memory (to Orbax: one component).

  Args:
    name: see `open_model`; several names: see `open_models`.
    format: None: a model directory of safetensors; "orbax": one of Orbax trees; "safetensors": the release's layout.
    part: of the release's layout, this component alone.
    dtype: name of what floating-point numbers become; None: as they are stored.

  Returns:
    Lines to tell: what was written, what was left out and why.

  Raises:
    UserError: whatever is wrong with the model, before anything is written; trouble of the disk.
  """
  names = [name] if isinstance(name, str | os.PathLike) else name
  source, dtype = open_models(names), dtype and jnp.dtype(dtype)
  if part and format != "safetensors":
    raise UserError("--part goes with --format safetensors; a model directory holds its parts apart anyway")
  for one in names:  # what is not read of it, or not written, would be lost
    if Path(os.path.realpath(find(one))).is_relative_to(os.path.realpath(directory)):
      raise UserError(f"{directory}: {one}, which is read, lies there; choose another place")
  told = [f"left out, {source.name} has it but the model does not: {key}" for key in source.dropped()]
  if format == "safetensors":
    out, left = release.write(source, directory, part=part, dtype=dtype)
    told += [f"left out, the release has no such part: {component}" for component in left]
  else:
    out = model_dir.convert_model(source, directory, format=format or "safetensors", dtype=dtype)
  return [*told, os.fspath(out)]


def find(name: os.PathLike | str) -> epath.Path:
  """Where the model behind a name lies. Raises UserError if it is nowhere."""
  text = os.fspath(name)
  if text in BUNDLED:
    path = epath.Path(os.fspath(importlib.resources.files("blip3o_jax") / "assets" / text))
    if (path / model_dir.MANIFEST).exists():
      return path
    raise UserError(f"the bundled model {text!r} is missing from this installation; install the package again")
  path = epath.Path(text).expanduser()
  with reading(text):
    if path.exists():
      return path
  if _HUB_ID.fullmatch(text) and not isinstance(name, os.PathLike):
    return _fetch(text)
  names = ", ".join(BUNDLED)
  raise UserError(f"{text}: no such model; give a directory with {model_dir.MANIFEST}, or a bundled name ({names})")


@functools.cache  # a run opens its init_from several times
def _fetch(hub_id: str) -> epath.Path:
  import huggingface_hub  # slow to import, and seldom needed

  patterns = [*_FETCHED, *(f"*{file}" for file in TOKENIZER_FILES), "weights/**"]
  try:
    return epath.Path(
      huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns="*safety_checker*")
    )
  except Exception as error:  # the library raises whatever its transport does
    why = " ".join(str(error).split())[:160]
    raise UserError(
      f"{hub_id}: no such directory here, and the hub does not give it ({type(error).__name__}: {why})"
    ) from None
