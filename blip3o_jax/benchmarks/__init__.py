"""Measurements, one file a bench; each prints what it measured, where and how. Here: what they share."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax import __version__
from blip3o_jax.data.outputs import write_atomically


@dataclasses.dataclass(frozen=True)
class Case:
  """One thing to time.

  Attributes:
    name: for the page, batch and lengths in it.
    call: does all of it, and returns arrays of all that it computes.
    flops: of a call, by models.flops. moved: bytes that a call must at least read or write.
    count, unit: what a call makes, such as 8 pictures.
    compile_seconds; peak_bytes: what the program needs at most, by its compiler (0: not one program).
    given: what another implementation needs for the same work (benchmarks.torch).
  """

  name: str
  call: Callable[[], Any]
  flops: float = 0.0
  moved: float = 0.0
  count: float = 1
  unit: str = "calls"
  compile_seconds: float = 0.0
  peak_bytes: int = 0
  given: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def compiled(name: str, program: Callable, arguments: tuple, **facts) -> Case:
  """A case that is one program, compiled here. It must move its arguments once and its results once."""
  lowered = jax.jit(program).lower(*arguments)
  start = time.perf_counter()
  run = lowered.compile()
  seconds = time.perf_counter() - start
  moved = nbytes(arguments) + nbytes(jax.eval_shape(program, *arguments))
  return Case(name, lambda: run(*arguments), moved=moved, compile_seconds=seconds, peak_bytes=peak_bytes(run), **facts)


def warmed(name: str, call: Callable[[], Any], **facts) -> Case:
  """A case of several programs, called once here, which compiles them: seconds of that call less those of the next."""
  (first,), (second,) = in_turn(1, call)[0], in_turn(1, call)[0]
  return Case(name, call, compile_seconds=max(first - second, 0.0), **facts)


def nbytes(tree: Any) -> int:
  """Bytes of all arrays, abstract ones too."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))


def in_turn(rounds: int, *calls: Callable[[], Any]) -> list[list[float]]:
  """Seconds of each call, in the order A B C A B C ..., so that a machine that slows down slows all.

  Each call must return arrays of all that it computes; it has ended when they are there. Warm up and compile before.
  """
  seconds: list[list[float]] = [[] for _ in calls]
  for _ in range(rounds):
    for call, kept in zip(calls, seconds, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(call())
      kept.append(time.perf_counter() - start)
  return seconds


def spread(seconds: list[float]) -> dict[str, float]:
  """Median, least and most."""
  return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """What a program needs on one device at most, by its compiler: arguments, results and all in between."""
  m = compiled.memory_analysis()
  return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def ceiling(dtype: str, *, side: int = 0, rounds: int = 5) -> dict[str, float]:
  """What this device reaches now in one large product and one large copy: flops and bytes a second, best of `rounds`.

  Args:
    side: of the square matrices; 0: 2048 on a CPU, 8192 elsewhere, where the copy is 16 times larger as well.
  """
  side = side or (2048 if jax.default_backend() == "cpu" else 8192)
  a = jax.random.normal(jax.random.key(0), (side, side), dtype)  # a GPU multiplies ones faster
  b = jnp.ones((8 * side, side), "float32")
  product, copy = jax.jit(jnp.dot).lower(a, a).compile(), jax.jit(jnp.negative).lower(b).compile()
  in_turn(1, lambda: product(a, a), lambda: copy(b))
  products, copies = in_turn(rounds, lambda: product(a, a), lambda: copy(b))
  return {"flops_per_s": 2 * side**3 / min(products), "bytes_per_s": 2 * b.nbytes / min(copies)}


def figures_of(case: Case, seconds: list[float], top: Mapping[str, float]) -> dict[str, Any]:
  """What is told of a case. Its floor is the longer of computing and moving at the `ceiling`'s rates."""
  time_, compute, move = spread(seconds), case.flops / top["flops_per_s"], case.moved / top["bytes_per_s"]
  return {
    "seconds": time_,
    f"{case.unit}_per_s": case.count / time_["median"],
    "compile_seconds": case.compile_seconds,
    "flops": case.flops,
    "bytes": case.moved,
    "flops_per_s": case.flops / time_["median"],
    "share_of_ceiling": max(compute, move) / time_["median"],
    "bound": "compute" if compute >= move else "memory",
    "peak_bytes": case.peak_bytes,
  }


def line(case: Case, figures: Mapping[str, Any]) -> str:
  """One case as one line of the page."""
  s = figures["seconds"]
  told = f"{case.name:<44} {_seconds(s['median'])} ({_seconds(s['min'])} to {_seconds(s['max'])})"
  told += f"  {figures[f'{case.unit}_per_s']:.3g} {case.unit}/s"
  if case.flops or case.moved:
    told += f"  {figures['flops_per_s'] / 1e9:.0f} GFLOP/s, {figures['share_of_ceiling']:.0%} of the ceiling"
    told += f" ({figures['bound']})"
  peak = f", peak {case.peak_bytes / 2**20:.0f} MiB" if case.peak_bytes else ""
  return told + f"; compiled in {case.compile_seconds:.1f} s{peak}"


def _seconds(value: float) -> str:
  return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def report(path: Path | str | None, figures: Mapping[str, Any]) -> dict[str, Any]:
  """The figures with command, device, versions and date; written to `path` if one is given."""
  installed = ("jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
  device = jax.local_devices()[0]
  facts = {
    "command": shlex.join(["blip3o", *sys.argv[1:]]),
    "device": f"{jax.device_count()} x {device.device_kind}",
    "driver": " ".join(device.client.platform_version.split()),
    "processor": _processor(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "jax": jax.__version__,
    "blip3o_jax": __version__,
    "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in installed},
    "date": datetime.date.today().isoformat(),
    "process_peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    "device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),  # a CPU counts none
  }
  if path:
    write_atomically(path, (json.dumps(facts | dict(figures), indent=2) + "\n").encode())
  return facts | dict(figures)


def _processor() -> str:
  """The name of the CPU, where the system tells it."""
  path = Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  names = [text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()
