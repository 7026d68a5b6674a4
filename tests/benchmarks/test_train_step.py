"""The paired benchmark in small: all of it runs, and unequal steps are found out before any time is told."""

import json

import jax
import pytest
import tiny

from blip3o_jax import benchmarks
from blip3o_jax.benchmarks import sizes, train_step
from blip3o_jax.cli import main
from blip3o_jax.errors import CheckFailed
from blip3o_jax.models import presets


def test_it_compares(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(jax, "jit", tiny.quick_jit)
  monkeypatch.setattr(sizes, "MID", presets.difference(presets.get("blip3o-4b"), tiny.config()))
  monkeypatch.setattr(train_step, "_BUCKETS", ())
  made = lambda config, program, wanted, say: jax.device_put({name: tiny.params()[name] for name in wanted})
  monkeypatch.setattr(train_step.trainer, "initial_params", made)  # compiled otherwise
  assert (
    main(["bench", "train-step", "--batch-size", "2", "--rounds", "1", "--out", str(tmp_path / "figures.json")]) == 0
  )
  figures = json.loads((tmp_path / "figures.json").read_text())
  assert len(figures["losses"][0]) == 2 and figures["losses"][0] == pytest.approx(figures["losses"][1], rel=1e-5)
  assert figures["peak_bytes"]["ours"] < figures["peak_bytes"]["plain"]
  assert figures["cache_bytes_a_picture"] > 4 * 4 * 16 and figures["images_per_s"]["ours"] > 0
  assert {"device", "jax", "date"} <= set(figures)
  assert "speed-up" in capsys.readouterr().out


def test_other_losses_tell_no_time():
  with pytest.raises(CheckFailed, match="no time is told"):
    train_step._check([[1.0, 2.0], [1.0, 2.1]], "float32")


def test_what_cannot_run_beside_it_is_told():
  def broken():
    raise RuntimeError("CUDA out of\nmemory")

  able, why = train_step._running({"torch": lambda: None, "torch.compile": broken})
  assert list(able) == ["torch"] and why == {"torch.compile": "RuntimeError: CUDA out of memory"}


def test_sizes_keep_the_proportions_of_the_release():
  parts = train_step._parts(sizes.architecture(), 192)
  unit = parts["encoder"] / 9.4
  assert parts["backbone"] / unit == pytest.approx(10, abs=0.3) and parts["dit"] / unit == pytest.approx(0.7, abs=0.05)
  real = train_step._parts(presets.get("blip3o-8b"), 192)
  assert real["backbone"] / real["encoder"] == pytest.approx(10 / 9.4, rel=0.1)
  assert parts["logits"] / parts["backbone"] == pytest.approx(real["logits"] / real["backbone"], rel=0.2)


def test_in_turn():
  order = []
  seconds = benchmarks.in_turn(3, lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c"))
  assert order == ["a", "b", "c"] * 3 and [len(one) for one in seconds] == [3, 3, 3]
