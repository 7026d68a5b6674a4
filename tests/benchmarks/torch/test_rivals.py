"""The release's building blocks beside ours: all agree, in miniature. Left out where torch is not installed."""

import dataclasses

import bench_sizes
import jax
import pytest
import tiny

from blip3o_jax.benchmarks import parts, run, sizes, train_step

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blip3o_jax.benchmarks.torch import rivals


@pytest.mark.parametrize("name", parts.PARTS)
def test_they_agree(name, monkeypatch):
  monkeypatch.setattr(sizes, "MID", bench_sizes.MID)
  monkeypatch.setattr(jax, "jit", tiny.quick_jit)
  on = parts.Setup(**vars(parts.setup()) | {"length": 16, "new": 3, "pictures": (2,), "steps": (2, 2)})
  monkeypatch.setattr(parts, "setup", lambda preset, batch: on)
  for case in parts.PARTS[name](on):
    eager = rivals.make(case)["torch"]  # torch.compile would take a minute each
    assert rivals.difference(case, eager) <= run.BARS["float32"], case.name
    broken = lambda result, arrays=eager.work.arrays: {key: 1.01 * x for key, x in arrays(result).items()}
    eager.work = dataclasses.replace(eager.work, arrays=broken)
    assert rivals.difference(case, eager) > run.BARS["float32"]


def test_the_training_steps_have_the_same_losses(monkeypatch):
  monkeypatch.setattr(sizes, "MID", bench_sizes.MID)
  monkeypatch.setattr(jax, "jit", tiny.quick_jit)
  monkeypatch.setattr(train_step, "_BUCKETS", ())
  eager = lambda *args, steps=rivals.steps: {"torch": steps(*args)["torch"]}  # torch.compile would take minutes
  monkeypatch.setattr(rivals, "steps", eager)
  figures = train_step.run(batch_size=2, rounds=1, vs="torch")
  assert len(figures["losses"]) == 3 and figures["others"]["torch"]["ours_is_faster"]["median"] > 0
