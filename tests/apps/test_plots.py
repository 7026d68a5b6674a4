"""Loss curves: what is read, how it is smoothed, where it lands in the picture."""

import json
import math
import re

import pytest

from blip3o_jax.apps import plots


def test_read_curve_leaves_out_what_cannot_be_drawn(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = [{"step": 1, "loss": 2.0}, {"step": 50, "loss": math.nan}, {"step": 100}, {"step": 150, "loss": 0.5}]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 200, "lo')
  assert plots.read_curve(path, "vae") == plots.Curve("vae", (1, 150), (2.0, 0.5))


def test_smooth_keeps_a_level_and_averages_in_the_logarithm():
  assert plots.smooth([3.0] * 50) == pytest.approx([3.0] * 50)
  noisy = [2.0 ** (-1) ** n for n in range(1000)]  # 2, 1/2, 2, ...: the mean of the logarithm is 0
  assert plots.smooth(noisy, span=0.1)[-1] == pytest.approx(1.0, abs=0.01)
  assert plots.smooth(noisy)[0] == 2.0


@pytest.mark.parametrize("low, high", [(0.19, 0.5), (0.001, 100.0), (0.30, 1.2), (0.98, 1.02)])
def test_log_ticks_are_inside_and_enough(low, high):
  ticks = plots.log_ticks(low, high)
  assert len(ticks) >= 3 and all(low <= t <= high for t in ticks)


def test_linear_ticks_are_round():
  assert plots.linear_ticks(0, 3000) == [0, 1000, 2000, 3000]
  assert plots.linear_ticks(0, 650) == [0, 200, 400, 600]


def test_the_drawing_has_axes_and_ends_where_the_loss_ends():
  svg = plots.loss_svg(plots.Curve("vae", (1, 100, 200), (1.0, 0.5, 0.25)))
  assert "training step" in svg and "loss (log)" in svg
  xs, ys = zip(*(map(float, p.split(",")) for p in re.search(r'course" d="M([^"]+)"', svg)[1].split("L")), strict=True)
  assert list(xs) == sorted(xs) and xs[-1] == pytest.approx(plots.WIDTH - plots.RIGHT)
  assert list(ys) == sorted(ys)  # a falling loss goes down the page
  assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.3)  # equal factors, equal distances


def test_one_wild_step_stays_inside_the_frame():
  svg = plots.loss_svg(plots.Curve("vae", tuple(range(1, 102)), (1.0,) * 50 + (1e6,) + (1.0,) * 50))
  ys = [float(y) for y in re.findall(r"[ML][\d.]+,([-\d.]+)", svg)]
  assert min(ys) >= plots.TOP and max(ys) <= plots.HEIGHT - plots.BOTTOM
