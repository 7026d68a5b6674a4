"""`blip3o verify`: replay recorded activations of the reference and say how far ours are from them (floor 6).

One small module a component, each with `check(recording)`.
"""

import importlib
import json
import math
import os
from collections.abc import Sequence

import jax

from blip3o_jax.errors import CheckFailed, UserError, told
from blip3o_jax.verification.recording import MISFITS, Line, Recording

# Component, as fixture.json names it -> module of this package.
_MODULES = {
  "next_dit": "next_dit",
  "eva_clip": "eva_clip",
  "flow_matching": "flow_matching",
  "sdxl_decoder": "sdxl_decoder",
  "qwen2_5_vl": "qwen2_5_vl",
  "blip3o_generate": "blip3o_generate",
  "blip3o_train_step": "blip3o_train_step",
  "llama": "text_decoder",
  "qwen3": "text_decoder",
  "siglip": "siglip",
  "sana_decoder": "sana_decoder",
}


def replay(directory: os.PathLike | str, precision: str = "highest") -> list[Line]:
  """Replay one recording in float32; what became of each of its arrays. The bars are for full-precision products.

  Args:
    precision: of the products: "highest", or "bfloat16", to which accelerators round by default and CPUs never do.

  Raises:
    UserError: not a recording, an input is absent, its arrays, weights and settings do not fit each other, or its
      component is not known.
  """
  recording = Recording(directory)
  if recording.component not in _MODULES:
    raise UserError(
      f"{recording.path}: component {recording.component!r} is not supported yet; there are {', '.join(_MODULES)}"
    )
  module = importlib.import_module(f"{__name__}.{_MODULES[recording.component]}")
  try:
    with jax.default_matmul_precision(precision):
      module.check(recording)
  except UserError as error:
    raise UserError(f"{recording.path}: {error}") from error
  except MISFITS as error:
    raise UserError(
      f"{recording.path}: its arrays, weights and settings do not fit each other ({told(error)}); record it again"
    ) from error
  return recording.close()


def verify(directories: Sequence[os.PathLike | str], as_json: bool = False) -> None:
  """Replay recordings and print a line for every array: its error and its bar. One that cannot be replayed does not
  keep the others from it.

  Args:
    directories: each holds fixture.json, config, weights and io.npz (DESIGN part 3, "Recordings").
    as_json: print one JSON document instead of lines.

  Raises:
    UserError: see `replay`; the first of them, after all else is printed.
    CheckFailed: an array misses its bar, is not known, or nothing was compared.
  """
  if not directories:
    raise UserError("verify: no recording given; name one or more directories with a fixture.json")
  missed, results, errors = [], [], []
  for directory in directories:
    lines: list[Line] = []
    result = {"recording": os.fspath(directory)}
    try:
      lines = replay(directory)
    except UserError as error:
      errors.append(error)
      result["error"] = str(error)
    missed += [f"{directory}: {line.name}" for line in lines if line.status == "miss"]
    results.append(result | {"arrays": [_as_json(line) for line in lines]})
    if not as_json:
      print(f"{directory}", *(lines or [f"  {result['error']}"]), sep="\n", flush=True)
  if as_json:
    print(json.dumps({"ok": not (missed or errors), "recordings": results}, indent=2))
  if errors:
    raise errors[0]
  if missed:
    more = f" and {len(missed) - 10} more" if len(missed) > 10 else ""
    raise CheckFailed(f"{len(missed)} missed: {'; '.join(missed[:10])}{more}")
  if not as_json:
    print("all within their bars")


def _as_json(line: Line) -> dict:
  """JSON knows no infinity."""
  error = None if line.error is None or not math.isfinite(line.error) else line.error
  return {"name": line.name, "status": line.status, "error": error, "bar": line.bar, "note": line.note}
