"""`blip3o bench curves`: how time grows with the batch, the depth and the length, and shrinks with devices, as one plot
with the slopes named.

Both axes are logarithms, in multiples of the first point: slope 1 is time in proportion; below 1 there is something to
gain from more at once; above 1 something is quadratic. Of devices, which share one batch, -1 is all that can be had; on
a CPU they are simulated, one a core, and share its cores, all of which one device uses as well: 0 loses nothing.
"""

import contextlib
import dataclasses
import html
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from blip3o_jax import benchmarks
from blip3o_jax.benchmarks import Case, parts
from blip3o_jax.data.outputs import write_atomically

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 560, 360, 52, 16, 16, 44
_COLOURS = ("#1f6feb", "#d1571b", "#2a8a3e", "#8250df")


def run(*, preset: str = "", rounds: int = 3, points: int = 4, out: Path | None = None) -> dict[str, Any]:
  """Measure and print every curve; `out` gets the figures, and a plot beside it with the ending .svg.

  Args:
    preset: a key of sizes.REAL; "": sizes for a CPU. points: of a curve, each twice the one before.
  """
  if jax.config.jax_num_cpu_devices < 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    with contextlib.suppress(RuntimeError):  # the back end runs already: keep what it has
      jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
  on, curves = parts.setup(preset), {}
  for name, cases in _curves(on, points).items():
    sizes_, seconds = [], []
    for size, case in cases:
      benchmarks.in_turn(1, case.call)
      (taken,) = benchmarks.in_turn(rounds, case.call)
      sizes_.append(size)
      seconds.append(benchmarks.spread(taken))
      print(f"{name:<40} {size:>5} {seconds[-1]['median']:8.3f} s", flush=True)
    fit = slope(sizes_, [s["median"] for s in seconds])
    curves[name] = {"sizes": sizes_, "seconds": seconds, "slope": fit}
    print(f"{name:<40} slope {fit:.2f}", flush=True)
  if out:
    write_atomically(out.with_suffix(".svg"), plot(curves).encode())
  return benchmarks.report(out, {"sizes": {"preset": preset or "mid", "dtype": on.dtype}, "curves": curves})


def _curves(on: parts.Setup, points: int) -> dict[str, Iterator[tuple[int, Case]]]:
  """{name: (size, case) each}; a case is made when its turn comes."""
  doubled = [2**i for i in range(points)]
  gradient = lambda setup: list(parts.dit(setup))[1]
  layers = lambda n: dataclasses.replace(on.cfg, dit=dataclasses.replace(on.cfg.dit, layers=n))
  shared = [n for n in doubled if n <= jax.device_count()]
  together = dataclasses.replace(on, batch=on.batch * shared[-1])
  curves = {
    "DiT forward and backward, latents": ((4 * n, gradient(dataclasses.replace(on, batch=n))) for n in doubled),
    "DiT forward and backward, layers": (
      (2 * n, gradient(dataclasses.replace(on, cfg=layers(2 * n)))) for n in doubled
    ),
    "backbone, tokens of a prompt": (
      (64 * n, next(parts.backbone(dataclasses.replace(on, length=64 * n)))) for n in doubled
    ),
  }
  if len(shared) > 1:
    name = "DiT forward and backward, devices"
    curves[name] = ((n, gradient(dataclasses.replace(together, devices=n))) for n in shared)
  return curves


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
  """d log(time) / d log(size), by least squares."""
  return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def plot(curves: dict[str, Any]) -> str:
  """An SVG: time over size, both in multiples of a curve's first point, both axes logarithmic."""
  relative = {
    name: [
      (n / c["sizes"][0], s["median"] / c["seconds"][0]["median"])
      for n, s in zip(c["sizes"], c["seconds"], strict=True)
    ]
    for name, c in curves.items()
  }
  doublings = lambda axis: math.ceil(max([1.0, *(math.log2(p[axis]) for line in relative.values() for p in line)]))
  across, up = doublings(0), doublings(1)
  down = math.floor(min(0.0, *(math.log2(time) for line in relative.values() for _, time in line)))
  x = lambda value: LEFT + math.log2(value) / across * (WIDTH - LEFT - RIGHT)
  y = lambda value: HEIGHT - BOTTOM - (math.log2(value) - down) / (up - down) * (HEIGHT - TOP - BOTTOM)

  def text(at: float, down: float, words: object, anchor: str = "middle") -> str:
    return f'<text x="{at:.1f}" y="{down:.1f}" text-anchor="{anchor}">{words}</text>'

  drawn = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
  ]
  for i in range(down, up + 1):
    drawn.append(f'<path d="M{LEFT} {y(2.0**i):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
    drawn.append(text(LEFT - 6, y(2.0**i) + 4, 2**i if i >= 0 else f"1/{2**-i}", "end"))
  drawn += [text(x(2**i), HEIGHT - BOTTOM + 16, f"x {2**i}") for i in range(across + 1)]
  drawn.append(text(WIDTH / 2, HEIGHT - 8, "size, in multiples of the first"))
  drawn.append(text(LEFT, TOP - 4, "time, in multiples of the first", "start"))
  for i, (name, line) in enumerate(relative.items()):
    colour, path = _COLOURS[i % len(_COLOURS)], "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line)
    label = f"{html.escape(name)}: slope {curves[name]['slope']:.2f}"
    drawn.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    drawn.append(f'<g fill="{colour}">{text(LEFT + 10, TOP + 16 * (i + 1), label, "start")}</g>')
  return "\n".join([*drawn, "</svg>", ""])
