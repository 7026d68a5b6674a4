"""BLIP3-o in JAX and Flax: unified image understanding and generation.

`load` opens a model directory (or the bundled "micro") and gives an object with `.generate`, `.chat` and
`.reconstruct`. Names are resolved on first use, so that importing the package, and `blip3o --help`, import no jax.
"""

import importlib

from blip3o_jax.errors import CheckFailed, Preempted, UserError

__version__ = "0.1.0"

_LAZY = {
  "load": "blip3o_jax.inference.model",
  "Model": "blip3o_jax.inference.model",
  "load_config": "blip3o_jax.training.config",
}

__all__ = ["CheckFailed", "Preempted", "UserError", "__version__", *_LAZY]


def __getattr__(name: str):
  if name not in _LAZY:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_LAZY[name]), name)
