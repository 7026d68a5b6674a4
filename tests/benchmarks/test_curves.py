import json
import xml.etree.ElementTree

import bench_sizes
import jax
import pytest
import tiny

from blip3o_jax.benchmarks import curves, sizes


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


@pytest.mark.slow
def test_the_bench(monkeypatch, tmp_path):
  monkeypatch.setattr(sizes, "MID", bench_sizes.MID)
  monkeypatch.setattr(jax, "jit", tiny.quick_jit)
  curves.run(rounds=1, points=2, out=tmp_path / "curves.json")
  found = json.loads((tmp_path / "curves.json").read_text())["curves"]
  assert [c["sizes"] for c in found.values()] == [[4, 8], [2, 4], [64, 128]]
  assert all(c["slope"] == c["slope"] for c in found.values()) and (tmp_path / "curves.svg").exists()
