"""Another implementation of a case, checked against ours. torch is imported when one is made, not before."""

import dataclasses
import importlib
import importlib.metadata
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
    UserError: torch, transformers or diffusers is not here, or torch.compile does not work.
  """
  torch = _torch()
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
    UserError: as `make`.
  """
  torch = _torch()
  step = importlib.import_module(f"{__package__}.step").Step
  ways = {"torch": lambda network: network, "torch.compile": torch.compile}
  return {name: step(config, cfg, params, iter(batches), wrap) for name, wrap in ways.items()}


def difference(case: Case, rival: Rival) -> float:
  """max|ours - theirs| / max|theirs|, the worst of all arrays; calls the rival twice, to warm it up.

  An array of less than a thousandth of the largest one is measured against that thousandth: the gradients of biases
  that bear on nothing (those of cross-attention's keys) are rounding alone.
  """
  seconds = []
  for _ in range(2):
    start = time.perf_counter()
    result = rival.call()
    seconds.append(time.perf_counter() - start)
  rival.compile_seconds = max(seconds[0] - seconds[1], 0.0)
  ours, theirs = rival.work.ours(case.call()), rival.work.arrays(result)
  if ours.keys() != theirs.keys():
    return float("inf")
  largest = {name: float(np.abs(x).max()) for name, x in theirs.items()}
  floor = max(1e-3 * max(largest.values()), 1e-6)
  return max(_apart(ours[name], theirs[name]) / max(largest[name], floor) for name in ours)


def _apart(ours: Any, theirs: Any) -> float:
  """max|ours - theirs|, infinite where they cannot be compared. Levels of pixels: less one, which rounding may cost."""
  ours, theirs = np.asarray(ours), np.asarray(theirs, np.float64)
  rounding = 1.0 if ours.dtype == np.uint8 else 0.0
  if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
    return float("inf")
  return max(float(np.abs(ours - theirs).max()) - rounding, 0.0)


def facts() -> dict[str, Any]:
  """Versions and threads of the other side."""
  torch = _torch()
  names = ("torch", "transformers", "diffusers")
  return {
    "torch_versions": {name: importlib.metadata.version(name) for name in names},
    "torch_threads": torch.get_num_threads(),
    "torch_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
  }


def _torch() -> Any:
  """torch, with as many threads as XLA takes: one a core."""
  try:
    import diffusers  # noqa: F401
    import torch
  except ImportError as error:
    raise UserError(f'--vs torch needs PyTorch ({error}): pip install "blip3o_jax[torch]"') from error
  return torch
