"""`blip3o bench NAME [--vs torch]`: time the cases of a part, beside this machine's ceiling and beside PyTorch."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from blip3o_jax import benchmarks
from blip3o_jax.benchmarks import parts, storage
from blip3o_jax.benchmarks.torch import rivals
from blip3o_jax.errors import CheckFailed, told

CASES: dict[str, Callable[..., Iterator[benchmarks.Case]]] = parts.PARTS | storage.PARTS
BARS = {"float32": 1e-3, "bfloat16": 1e-1}  # greatest rivals.difference from another implementation


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
    out: a JSON file of the figures, written again after every case.

  Raises:
    CheckFailed: other results than torch's, told once all the rest is measured. UserError: no torch here.
  """
  if vs:
    rivals.require()
  against = rivals.make if vs else lambda case: {}
  on = parts.setup(preset, batch_size)
  top = benchmarks.ceiling(on.dtype)
  print(
    f"ceiling, {on.dtype}: {top['flops_per_s'] / 1e9:.0f} GFLOP/s in a product, {top['bytes_per_s'] / 1e9:.1f} GB/s "
    "in a copy, measured now",
    flush=True,
  )
  # Where products of float32 are rounded, the two sides agree no better than in bfloat16.
  rounded = on.dtype != "float32" or jax.default_backend() != "cpu"
  sized = {"preset": preset or "mid", "dtype": on.dtype, "rounds": rounds}
  figures = {"sizes": sized, "ceiling": top, "cases": {}, "disagree": []}
  for name in names:
    for case in CASES[name](on):
      try:
        figures["cases"][case.name] = _measured(case, against, rounds, top, "bfloat16" if rounded else "float32")
      except CheckFailed as error:
        print(error, flush=True)
        figures["disagree"].append(str(error))
      gc.collect()
      record = benchmarks.report(out, figures | (rivals.facts() if vs else {}))
  if figures["disagree"]:
    raise CheckFailed("; ".join(figures["disagree"]))
  return record


def _measured(case, against: Callable, rounds: int, top: dict, precision: str) -> dict[str, Any]:
  """Figures of a case and of the others at the same work, printed."""
  others, apart, broken = _others(case, against, precision)
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
  for name, words in broken.items():
    figures["others"][name] = {"error": words}
    print(f"  {name:<16} did not run: {words}", flush=True)
  return figures


def _others(case, against: Callable, precision: str) -> tuple[dict[str, Any], dict[str, float], dict[str, str]]:
  """Those that agree, warmed up; how far they are apart; and what went wrong with the rest: they may find no room on a
  GPU, or torch.compile no compiler, and what they are compared with is still to be measured."""
  others, apart, broken = {}, {}, {}
  name = "torch"
  try:
    for name, other in against(case).items():
      apart[name] = rivals.difference(case, other, precision)
      others[name] = other
  except Exception as error:
    broken[name] = told(error)
  for name, found in apart.items():
    if not found <= BARS[precision]:
      raise CheckFailed(
        f"{case.name}: {name} differs by {found:.1e}, more than {BARS[precision]:.0e}, so no time is told"
      )
  return others, apart, broken
