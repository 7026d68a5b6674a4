"""The release's building blocks beside ours: all agree, in miniature. Left out where torch is not installed."""

import dataclasses

import bench_sizes
import jax
import numpy as np
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


@pytest.mark.parametrize("name", ["dit", "chat"])
def test_they_agree_in_bfloat16(name, monkeypatch):
  """Where rounding alone makes another answer of an answer, and noise of small gradients."""
  monkeypatch.setattr(sizes, "MID", bench_sizes.MID)
  on = parts.Setup(**vars(parts.setup()) | {"length": 40, "new": 16, "dtype": "bfloat16"})
  for case in parts.PARTS[name](on):
    eager = rivals.make(case)["torch"]
    assert rivals.difference(case, eager, "bfloat16") <= 0.5 * run.BARS["bfloat16"], case.name

    def wrong(result, ours=eager.work.ours):
      """One array of many, such as the gradient of one kernel."""
      found = ours(result)
      name = max(found, key=lambda key: np.size(found[key]))
      return found | {name: np.zeros_like(found[name])}

    eager.work = dataclasses.replace(eager.work, ours=wrong)
    assert rivals.difference(case, eager, "bfloat16") > run.BARS["bfloat16"]


def test_networks_are_made_as_the_libraries_make_them():
  """In bfloat16 from the start, but for the frequencies of rotary positions."""
  import torch

  from blip3o_jax.benchmarks.torch import parts as torch_parts

  cfg = sizes.presets.get("blip3o-4b", bench_sizes.MID)
  network = torch_parts.open_backbone(cfg, sizes.weights(cfg, ("backbone",), "bfloat16")["backbone"], "bfloat16")
  assert {x.dtype for x in network.parameters()} == {torch.bfloat16}
  assert {x.dtype for x in network.buffers()} == {torch.float32} and torch.get_default_dtype() == torch.float32


def test_the_training_steps_have_the_same_losses(monkeypatch):
  monkeypatch.setattr(sizes, "MID", bench_sizes.MID)
  monkeypatch.setattr(jax, "jit", tiny.quick_jit)
  monkeypatch.setattr(train_step, "_BUCKETS", ())
  eager = lambda *args, steps=rivals.steps: {"torch": steps(*args)["torch"]}  # torch.compile would take minutes
  monkeypatch.setattr(rivals, "steps", eager)
  figures = train_step.run(batch_size=2, rounds=1, vs="torch")
  assert len(figures["losses"]) == 3 and figures["others"]["torch"]["ours_is_faster"]["median"] > 0
