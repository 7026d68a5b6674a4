"""The release's building blocks beside ours: all agree, in miniature. Left out where torch is not installed."""

import dataclasses

import bench_sizes
import jax
import pytest
import tiny

from blip3o_jax.benchmarks import parts, run, sizes

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
