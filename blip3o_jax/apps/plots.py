"""Loss curves as inline SVG: no plotting library, no request, colours from the page's own variables."""

import dataclasses
import html
import math
from collections.abc import Sequence
from pathlib import Path

from blip3o_jax.training import metrics

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 38  # margins, SVG units


@dataclasses.dataclass(frozen=True)
class Curve:
  """One stage's training loss: `steps` and `losses` of equal length, losses finite and above zero."""

  name: str
  steps: tuple[int, ...]
  losses: tuple[float, ...]


def read_curve(path: str | Path, name: str) -> Curve:
  """The loss of every logged step of a `metrics.jsonl`; lines without a finite loss are passed over."""
  found = {line["step"]: line["loss"] for line in metrics.read(Path(path)) if _drawable(line.get("loss"))}
  steps = sorted(found)
  return Curve(name, tuple(steps), tuple(found[s] for s in steps))


def _drawable(loss: float | None) -> bool:
  return loss is not None and math.isfinite(loss) and loss > 0


def smooth(losses: Sequence[float], span: float = 0.03) -> list[float]:
  """Exponential mean of log(loss) over about `span` of the run, debiased, so that it starts at the first loss.

  In the logarithm, because a loss falls by factors: an arithmetic mean would trail far above the curve at the start.
  """
  keep = 1.0 - 1.0 / max(1.0, span * len(losses))
  total = weight = 0.0
  result = []
  for loss in losses:
    total, weight = keep * total + math.log(loss), keep * weight + 1.0
    result.append(math.exp(total / weight))
  return result


def log_ticks(low: float, high: float) -> list[float]:
  """Round numbers inside [low, high], at least three where the range allows: powers of ten, else finer."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
    ticks = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
    if len(ticks) >= 3:
      return ticks
  return linear_ticks(low, high)


def linear_ticks(low: float, high: float) -> list[float]:
  """About four round numbers inside [low, high]."""
  size = 10.0 ** math.floor(math.log10(max(high - low, 1e-12) / 4))
  size *= next(m for m in (1, 2, 5, 10) if (high - low) / (size * m) <= 4)
  return [n * size for n in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _number(value: float) -> str:
  if value >= 1000 and value % 100 == 0:
    return f"{value / 1000:g}k"
  return f"{value:.3g}"


def loss_svg(curve: Curve) -> str:
  """An SVG element: the loss (faint) and its smoothed course (strong) over training steps, logarithmic loss axis."""
  smoothed = smooth(curve.losses)
  low, high = min(smoothed), max(smoothed)
  # The frame follows the smoothed course with some air; single wild steps may leave it and are clipped.
  pad = max((high / low) ** 0.12, 1.05)
  low, high = low / pad, high * pad
  first, last = min(curve.steps[0], 0), max(curve.steps[-1], curve.steps[0] + 1)
  x = lambda step: LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
  y = lambda loss: TOP + math.log(high / loss) / math.log(high / low) * (HEIGHT - TOP - BOTTOM)

  def path(losses: Sequence[float]) -> str:
    stride = max(1, len(losses) // 240)
    keep = sorted({*range(0, len(losses), stride), len(losses) - 1})
    dots = (f"{x(curve.steps[i]):.1f},{min(max(y(losses[i]), TOP), HEIGHT - BOTTOM):.1f}" for i in keep)
    return "M" + "L".join(dots)

  parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(curve.name)} loss">']
  for tick in log_ticks(low, high):
    at = y(tick)
    parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    parts.append(f'<text x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
  for tick in linear_ticks(first, last):
    parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_number(tick)}</text>')
  middle = (TOP + HEIGHT - BOTTOM) / 2
  parts += [
    f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">training step</text>',
    f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">loss (log)</text>',
    f'<path class="raw" d="{path(curve.losses)}"/>',
    f'<path class="course" d="{path(smoothed)}"/>',
    f'<circle class="end" cx="{x(curve.steps[-1]):.1f}" cy="{y(smoothed[-1]):.1f}" r="3.2"/>',
    "</svg>",
  ]
  return "".join(parts)
