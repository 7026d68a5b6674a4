"""How fast a run is and where its time goes: model FLOP/s utilisation, waiting for data, saving, goodput."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from blip3o_jax.data.outputs import write_atomically
from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.models.flops import training_flops
from blip3o_jax.types import Batch

# Dense bfloat16 FLOP/s of what JAX calls one device, by its device_kind. TPUs: cloud.google.com/tpu/docs, "System
# architecture" (v7x: 2307 TFLOP/s a chip of two devices; v2 and v3: two devices a chip as well). GPUs: NVIDIA's data
# sheets, SXM boards, without sparsity.
PEAK_FLOPS = {
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


def step_flops(
  objective: Any, args: Mapping[str, Any], cfg: Blip3oConfig, trained: Collection[str]
) -> Callable[[Batch], float | None]:
  """A function of a batch: floating-point operations of one step over it, on all devices together.

  Those of the mathematics (models.flops.training_flops), whatever is computed again to save memory. None where the
  objective does not say through which parts it goes (`passes`, see objectives).
  """

  known: dict[Any, float] = {}

  def count(batch: Batch) -> float:
    shapes = jax.tree.map(lambda x: tuple(x.shape), batch)
    key = tuple(jax.tree.leaves(shapes))
    if key not in known:
      groups = list(shapes.values()) if isinstance(next(iter(shapes.values())), dict) else [shapes]
      rows = sum(next(iter(group.values()))[0] for group in groups)
      known[key] = rows * training_flops(objective.passes(cfg, shapes, args), trained)
    return known[key]

  return count if hasattr(objective, "passes") else lambda batch: None


def utilisation(flops: float | None, seconds: float, devices: Collection[jax.Device]) -> float | None:
  """Model FLOP/s utilisation: flops / (seconds * devices * peak FLOP/s of one), Chowdhery et al. 2022, appendix B.

  The peak is that of bfloat16, whatever dtype is computed in. None on devices without a published peak, such as CPUs.
  """
  peak = PEAK_FLOPS.get(next(iter(devices)).device_kind)
  return flops / (seconds * len(devices) * peak) if flops and peak and seconds > 0 else None


class Timing:
  """Wall time of a run over all its starts, in seconds.

  goodput = useful / (now - first start), where useful is the time in the loop over steps that were kept, without
  compiling, waiting for data, saving and drawing samples. Steps that were lost to a crash, and the time between two
  starts, are in the denominator alone.
  """

  def __init__(self, workdir: epath.Path, *, useful: float = 0.0, seconds: float = 0.0, write: bool = True):
    """`useful` and `seconds` are those of the checkpoint that this start goes on from."""
    path = workdir / "began.txt"
    if write and not path.exists():
      write_atomically(path, f"{time.time():.3f}\n".encode())
    self._began = float(path.read_text()) if path.exists() else time.time()
    self._useful, self._seconds, self._start = useful, seconds, time.perf_counter()
    self._lost: dict[str, float] = defaultdict(float)
    self._mark, self._marked = self._start, dict[str, float]()

  @contextlib.contextmanager
  def lost(self, to: str) -> Iterator[None]:
    """Time inside the `with` is no step: "compile", "data", "save" or "sample"."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._lost[to] += time.perf_counter() - start

  @property
  def seconds(self) -> float:
    """In the loop, whatever was done there."""
    return self._seconds + time.perf_counter() - self._start

  @property
  def useful(self) -> float:
    return self._useful + time.perf_counter() - self._start - sum(self._lost.values())

  def goodput(self) -> float:
    """The share of wall time since the first start that went into steps."""
    return self.useful / max(time.time() - self._began, 1e-9)

  def lap(self) -> tuple[float, dict[str, float]]:
    """Since the last lap: seconds in all, and those lost by name."""
    now, lost = time.perf_counter(), dict(self._lost)
    lap = now - self._mark, {name: value - self._marked.get(name, 0.0) for name, value in lost.items()}
    self._mark, self._marked = now, lost
    return lap
