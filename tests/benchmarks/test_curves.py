import json
import os
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from blip3o_jax.benchmarks import curves


def test_the_slope():
  assert curves.slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_the_plot_draws_what_was_measured():
  seconds = lambda *values: [{"median": value} for value in values]
  svg = curves.plot({"a & b": {"sizes": [4, 8, 16], "seconds": seconds(1.0, 2.0, 4.0), "slope": 1.0}})
  root = xml.etree.ElementTree.fromstring(svg)
  line = next(e.get("d") for e in root.iter() if e.get("stroke-width") == "2")
  first, middle, last = ([float(v) for v in point.split()] for point in line.removeprefix("M").split("L"))
  assert first == [curves.LEFT, curves.HEIGHT - curves.BOTTOM] and last == [curves.WIDTH - curves.RIGHT, curves.TOP]
  assert middle == pytest.approx([(a + b) / 2 for a, b in zip(first, last, strict=True)], abs=0.1)
  assert "a & b: slope 1.00" in "".join(root.itertext())


def test_a_curve_that_falls_stays_within_the_plot():
  seconds = [{"median": value} for value in (4.0, 2.0, 1.0)]
  svg = curves.plot({"devices": {"sizes": [1, 2, 4], "seconds": seconds, "slope": -1.0}})
  line = next(e.get("d") for e in xml.etree.ElementTree.fromstring(svg).iter() if e.get("stroke-width") == "2")
  heights = [float(point.split()[1]) for point in line.removeprefix("M").split("L")]
  assert heights == sorted(heights) and heights[-1] == curves.HEIGHT - curves.BOTTOM and ">1/4<" in svg


SCRIPT = """
import pathlib, sys
import bench_sizes, jax, tiny
from blip3o_jax.benchmarks import curves, sizes
jax.jit, sizes.MID = tiny.quick_jit, bench_sizes.MID
curves.run(rounds=1, points=2, out=pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_bench_on_two_devices(tmp_path):
  env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
  subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "curves.json"], env=env, check=True)
  found = json.loads((tmp_path / "curves.json").read_text())["curves"]
  assert [c["sizes"] for c in found.values()] == [[4, 8], [2, 4], [64, 128], [1, 2]]
  assert all(c["slope"] == c["slope"] for c in found.values()) and (tmp_path / "curves.svg").exists()
