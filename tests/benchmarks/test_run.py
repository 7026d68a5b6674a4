"""The benches in miniature: all of them run, count what they should, and what disagrees is not timed."""

import json
import os

import bench_sizes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from blip3o_jax import benchmarks
from blip3o_jax.benchmarks import parts, run, sizes
from blip3o_jax.cli import main
from blip3o_jax.errors import CheckFailed
from blip3o_jax.models import flops


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(sizes, "MID", bench_sizes.MID)
  monkeypatch.setattr(jax, "jit", tiny.quick_jit)


def quick(**changes):
  on = parts.setup()
  return parts.Setup(**{**vars(on), "length": 16, "new": 3, "pictures": (2,), "steps": (1, 1)} | changes)


@pytest.fixture
def quick_setup(monkeypatch):
  on = quick()
  monkeypatch.setattr(parts, "setup", lambda preset, batch: on)
  return on


def test_the_dit(quick_setup, tmp_path, capsys):
  assert main(["bench", "dit", "--rounds", "2", "--out", str(tmp_path / "figures.json")]) == 0
  figures, told = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
  assert {"command", "device", "cores", "jax", "versions", "date", "ceiling", "sizes"} <= set(figures)
  forward, backward = (figures["cases"][f"dit forward{what}, 8 latents"] for what in ("", " and backward"))
  assert forward["flops"] == 8 * flops.next_dit(quick_setup.cfg.dit, 4) and backward["flops"] == 3 * forward["flops"]
  assert backward["peak_bytes"] > forward["peak_bytes"] > 0
  for name, row in figures["cases"].items():
    assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"] and name in told
    assert row["latents_per_s"] == pytest.approx(8 / row["seconds"]["median"])


@pytest.mark.slow
def test_every_part(quick_setup):
  rows = run.run(list(run.CASES), rounds=1)["cases"]
  assert {name.split(",")[0].split(" ")[0] for name in rows} == set(run.CASES)
  speed = {name.split(" ")[1] if "," in name else name: row.get("MB_per_s") for name, row in rows.items()}
  assert 0 < speed["save"] < speed["a"] and 0 < speed["restore"]


def test_a_case_counts_what_moves():
  case = benchmarks.compiled("sum", lambda x, y: x + y, (jnp.ones((4, 256)), jnp.ones((4, 256))))
  assert case.moved == 3 * 4 * 256 * 4 and case.peak_bytes >= case.moved and case.compile_seconds > 0
  np.testing.assert_array_equal(case.call(), 2.0)
  top = {"flops_per_s": 100.0, "bytes_per_s": 12288.0}
  figures = benchmarks.figures_of(case, [4.0, 2.0, 8.0], top)
  assert figures["seconds"]["median"] == 4.0 and figures["share_of_ceiling"] == 0.25 and figures["bound"] == "memory"


def test_the_ceiling_is_measured():
  top = benchmarks.ceiling("float32", side=128, rounds=2)
  assert top["flops_per_s"] > 1e7 and top["bytes_per_s"] > 1e7


def test_what_disagrees_is_not_timed(monkeypatch):
  case = benchmarks.Case("dit", lambda: pytest.fail("timed"))
  monkeypatch.setattr(run.rivals, "difference", lambda *_: 0.5)
  with pytest.raises(CheckFailed, match="no time is told"):
    run._measured(case, lambda _: {"torch": None}, 1, {}, "float32")


def test_the_rest_is_measured_when_one_disagrees_or_does_not_run(monkeypatch, tmp_path, capsys):
  def difference(case, other, precision):
    if case.name == "two" and other == "torch.compile":
      raise RuntimeError("no C compiler\nwas found")
    return 0.5 if case.name == "one" else 0.0

  cases = [benchmarks.Case(name, lambda: jnp.ones(2)) for name in ("one", "two")]
  rival = type("Rival", (str,), {"call": lambda self: None, "compile_seconds": 0.0})
  monkeypatch.setattr(run, "CASES", {"dit": lambda on: iter(cases)})
  monkeypatch.setattr(run.rivals, "require", lambda: None)
  monkeypatch.setattr(run.rivals, "facts", dict)
  monkeypatch.setattr(run.rivals, "make", lambda case: {name: rival(name) for name in ("torch", "torch.compile")})
  monkeypatch.setattr(run.rivals, "difference", difference)
  with pytest.raises(CheckFailed, match="one: torch differs by 5.0e-01"):
    run.run(["dit"], vs="torch", rounds=1, out=tmp_path / "figures.json")
  figures = json.loads((tmp_path / "figures.json").read_text())
  assert list(figures["cases"]) == ["two"] and len(figures["disagree"]) == 1
  others = figures["cases"]["two"]["others"]
  assert others["torch"]["difference"] == 0.0
  assert others["torch.compile"] == {"error": "RuntimeError: no C compiler was found"}
  assert "torch.compile    did not run: RuntimeError: no C compiler was found" in capsys.readouterr().out


def test_without_torch_one_line(quick_setup, monkeypatch, capsys):
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
  for name in ("dit", "train-step"):
    assert main(["bench", name, "--vs", "torch"]) == 2
    out, err = capsys.readouterr()
    assert 'pip install "blip3o_jax[torch]"' in err and not out  # before anything is measured
  assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_random_weights_leave_nothing_at_zero():
  params = sizes.weights(sizes.architecture(), ("dit", "unet"), "float32")
  assert all(float(jnp.std(x)) > 0 for x in jax.tree.leaves(params) if x.size > 1)
