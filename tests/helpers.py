"""Shared by all tests: the recordings under tests/golden and the one error measure of the project."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def load_golden(name: str) -> SimpleNamespace:
  """Load one recording: `config` dict, `weights` {reference key: array}, `io` {name: array}, `fixture` dict, `path`.

  Whatever a recording lacks is an empty dict. Arrays keep the layout of the reference (NCHW, Linear [out, in]) and are
  read-only, because every test of a process shares them.
  """
  path = GOLDEN / name
  if not path.is_dir():
    raise FileNotFoundError(f"no recording at {path}")
  config = json.loads((path / "config.json").read_text()) if (path / "config.json").exists() else {}
  fixture = json.loads((path / "fixture.json").read_text()) if (path / "fixture.json").exists() else {}
  weights = next((load_file(f) for f in sorted(path.glob("*.safetensors"))), {})
  io = {}
  if (path / "io.npz").exists():
    with np.load(path / "io.npz") as stored:
      io = {key: stored[key] for key in stored.files}
  for array in [*weights.values(), *io.values()]:
    array.setflags(write=False)
  return SimpleNamespace(config=config, weights=weights, io=io, fixture=fixture, path=path)


def relative_error(ours, reference) -> float:
  """max|ours - reference| / max(max|reference|, 1e-6) of arrays of one shape; infinite where ours is not finite."""
  ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
  assert ours.shape == reference.shape, f"shapes differ: ours {ours.shape}, reference {reference.shape}"
  assert reference.size, "nothing to compare: the reference is empty"
  if not np.isfinite(ours).all():
    return float("inf")
  return float(np.abs(ours - reference).max() / max(np.abs(reference).max(), 1e-6))
