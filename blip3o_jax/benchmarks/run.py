"""`blip3o bench NAME [--vs torch]`: time the cases of a part, beside this machine's ceiling and beside PyTorch."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blip3o_jax import benchmarks
from blip3o_jax.benchmarks import parts, storage
from blip3o_jax.benchmarks.torch import rivals
from blip3o_jax.errors import CheckFailed

CASES: dict[str, Callable[..., Iterator[benchmarks.Case]]] = parts.PARTS | storage.PARTS
BARS = {"float32": 1e-3, "bfloat16": 5e-2}  # greatest difference from another implementation, of its largest number


def run(
  names: list[str],
  *,
  preset: str = "",
  vs: str = "",
  batch_size: int = 0,
  rounds: int = 5,
  out: Path | None = None,
) -> dict[str, Any]:
  """Measure the parts `names`, print a line a case, and return the figures.

  Args:
    names: of CASES. preset: a key of sizes.REAL; "": sizes for a CPU.
    vs: "torch": the same by the release's building blocks; everything that it computes must agree before it is timed.
    batch_size: examples at once; 0: the default of the size. rounds: timed calls of each.
    out: a JSON file of the figures.

  Raises:
    CheckFailed: other results than torch's. UserError: no torch here.
  """
  against = rivals.make if vs else lambda case: {}
  on = parts.setup(preset, batch_size)
  top = benchmarks.ceiling(on.dtype)
  print(
    f"ceiling, {on.dtype}: {top['flops_per_s'] / 1e9:.0f} GFLOP/s in a product, {top['bytes_per_s'] / 1e9:.1f} GB/s "
    "in a copy, measured now",
    flush=True,
  )
  rows = {}
  for name in names:
    for case in CASES[name](on):
      rows[case.name] = _measured(case, against(case), rounds, top, BARS[on.dtype])
      gc.collect()
  sized = {"preset": preset or "mid", "dtype": on.dtype, "rounds": rounds}
  return benchmarks.report(out, {"sizes": sized, "ceiling": top, "cases": rows} | (rivals.facts() if vs else {}))


def _measured(case, others: dict, rounds: int, top: dict, bar: float) -> dict[str, Any]:
  """Figures of a case and of the others at the same work, printed."""
  apart = {}
  for name, other in others.items():
    apart[name] = rivals.difference(case, other)  # warms both up
    if not apart[name] <= bar:
      raise CheckFailed(f"{case.name}: {name} differs by {apart[name]:.1e}, more than {bar:.0e}, so no time is told")
  if not others:
    benchmarks.in_turn(1, case.call)
  ours, *theirs = benchmarks.in_turn(rounds, case.call, *(other.call for other in others.values()))
  figures = benchmarks.figures_of(case, ours, top)
  print(benchmarks.line(case, figures), flush=True)
  figures["others"] = {}
  for (name, other), seconds in zip(others.items(), theirs, strict=True):
    ratio = benchmarks.spread([b / a for a, b in zip(ours, seconds, strict=True)])
    found = {"seconds": benchmarks.spread(seconds), "ours_is_faster": ratio, "difference": apart[name]}
    figures["others"][name] = found | {"compile_seconds": other.compile_seconds}
    print(
      f"  {name:<16} {found['seconds']['median']:.3f} s: ours is {ratio['median']:.2f} times as fast "
      f"({ratio['min']:.2f} to {ratio['max']:.2f}), results within {apart[name]:.0e}",
      flush=True,
    )
  return figures
