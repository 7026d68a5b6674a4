"""Another implementation of a case, checked against ours. torch is imported when one is made, not before."""

import dataclasses
import importlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from blip3o_jax.benchmarks import Case
from blip3o_jax.errors import UserError

# Work of a case -> the module of this package, and the function in it, that does the same.
_WORK = {
  "dit": ("parts", "dit"),
  "dit gradient": ("parts", "dit_gradient"),
  "backbone": ("parts", "backbone"),
  "encoder": ("parts", "encoder"),
  "unet": ("parts", "unet"),
  "vae": ("parts", "vae"),
  "generate": ("whole", "generate"),
  "chat": ("whole", "chat"),
}


@dataclasses.dataclass
class Work:
  """The same work by torch.

  Attributes:
    bind: (what wraps each network, such as torch.compile) -> the call, which has ended when it returns.
    arrays: of a result of that call, {name: array} in our layout. ours: the same of our result.
    compiles: whether the networks can be wrapped by torch.compile.
  """

  bind: Callable[[Callable], Callable[[], Any]]
  arrays: Callable[[Any], Mapping[str, np.ndarray]]
  ours: Callable[[Any], Mapping[str, np.ndarray]] = lambda result: {"output": result}
  compiles: bool = True


@dataclasses.dataclass
class Rival:
  """One way to run it. `compile_seconds` is how long the first call took beyond the second."""

  work: Work
  call: Callable[[], Any]
  compile_seconds: float = 0.0


def make(case: Case) -> dict[str, Rival]:
  """{name: rival} of a case, eager and compiled; nothing where the release has no such work.

  Raises:
    UserError: as `require`.
  """
  torch = require()
  if case.given.get("work") not in _WORK:
    return {}
  module, function = _WORK[case.given["work"]]
  work = getattr(importlib.import_module(f"{__package__}.{module}"), function)(case.given)
  rivals = {"torch": Rival(work, work.bind(lambda network: network))}
  if work.compiles:
    torch._dynamo.reset()
    rivals["torch.compile"] = Rival(work, work.bind(lambda network: torch.compile(network)))
  return rivals


def steps(config: Any, cfg: Any, params: Any, batches: list) -> dict[str, Any]:
  """{name: the release's training step}, eager and compiled; each goes through all `batches`, one a call.

  Raises:
    UserError: as `require`.
  """
  module = importlib.import_module(f"{__package__}.step")
  ways = {"torch": lambda network: network, "torch.compile": require().compile}
  return module.steps(config, cfg, params, batches, ways)


# By how products are rounded: the size of an array, and against which part of the largest one a smaller is measured.
# Gradients of biases that bear on nothing (those of cross-attention's keys) are rounding alone; in bfloat16 those of
# gates are little more, sums of what all but cancels, and of millions of pixels one is always far off.
_SIZES = {"float32": (lambda x: float(np.abs(x).max()), 1e-3), "bfloat16": (lambda x: float(np.linalg.norm(x)), 1e-1)}


def difference(case: Case, rival: Rival, precision: str = "float32") -> float:
  """max|ours - theirs| / max|theirs|, the worst of all arrays; where `precision` is bfloat16 norms, not maxima. Calls
  the rival twice, to warm it up."""
  seconds = []
  for _ in range(2):
    start = time.perf_counter()
    result = rival.call()
    seconds.append(time.perf_counter() - start)
  rival.compile_seconds = max(seconds[0] - seconds[1], 0.0)
  ours, theirs = rival.work.ours(case.call()), rival.work.arrays(result)
  if ours.keys() != theirs.keys():
    return float("inf")
  size, part = _SIZES[precision]
  sizes = {name: size(np.asarray(x, np.float64)) for name, x in theirs.items()}
  floor = max(part * max(sizes.values()), 1e-6)
  return max(size(_apart(ours[name], theirs[name])) / max(sizes[name], floor) for name in ours)


def _apart(ours: Any, theirs: Any) -> np.ndarray:
  """|ours - theirs|, infinite where they cannot be compared. Levels of pixels: less one, which rounding may cost."""
  ours, theirs = np.asarray(ours), np.asarray(theirs, np.float64)
  rounding = 1.0 if ours.dtype == np.uint8 else 0.0
  if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
    return np.asarray(np.inf)
  return np.maximum(np.abs(ours - theirs) - rounding, 0.0)


def facts() -> dict[str, Any]:
  """Versions and threads of the other side, and the most memory of a GPU that its arrays ever took."""
  torch = require()
  names, cuda = ("torch", "transformers", "diffusers"), torch.cuda.is_available()
  return {
    "torch_versions": {name: importlib.metadata.version(name) for name in names},
    "torch_threads": torch.get_num_threads(),
    "torch_device": torch.cuda.get_device_name() if cuda else "cpu",
    "torch_device_peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
  }


def require() -> Any:
  """torch, with as many threads as XLA takes: one a core. Call it before JAX starts: both must find room on a GPU, of
  which JAX would take three quarters at once.

  Raises:
    UserError: torch, transformers or diffusers is not here.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  try:
    import diffusers  # noqa: F401
    import torch
  except ImportError as error:
    raise UserError(f'--vs torch needs PyTorch ({error}): pip install "blip3o_jax[torch]"') from error
  torch.backends.cuda.matmul.allow_tf32 = True  # as XLA multiplies float32 on a GPU
  return torch
