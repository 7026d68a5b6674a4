"""The search: what it looks at, what it leaves out, and that it compiles the best few alone."""

import dataclasses
import itertools

import pytest
import small

from blip3o_jax.errors import CheckFailed
from blip3o_jax.planning import estimate, plan, search, topology


@pytest.fixture
def where():
  pytest.importorskip("libtpu")
  return topology.get("v5e:2x2")


def test_candidates_fit_and_are_in_order(tmp_path, where, monkeypatch):
  monkeypatch.setattr(search, "BATCHES", (1, 4))
  config = small.config(tmp_path)
  everything = search.candidates(config, where, "train")
  assert all(a.rate > 0.989 * b.rate for a, b in itertools.pairwise(everything))
  # More images share what the weights cost, and what remat repeats takes time.
  best, *_ = everything
  assert (best.config.batch_size, best.config.remat) == (16, "dots")
  meshes = {tuple(c.config.mesh[axis] for axis in ("data", "fsdp", "tensor")) for c in everything}
  assert meshes == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)}
  assert {c.config.remat for c in everything} == {"full", "dots"}
  assert {c.config.batch_size for c in everything} == {4, 16}
  # A chip too small for some of them: those are left out, and no other.
  peaks = sorted(c.peak for c in everything)
  chip = dataclasses.replace(where.chip, hbm=(peaks[0] + 1) / search.MARGIN)
  fewer = search.candidates(config, dataclasses.replace(where, chip=chip), "train")
  assert 0 < len(fewer) < len(everything) and all(c.peak <= peaks[0] + 1 for c in fewer)


def test_the_best_three_are_compiled(tmp_path, where, monkeypatch, capsys):
  monkeypatch.setattr(search, "BATCHES", (1, 2))
  made = []

  def compiled(config, name, *, slices, job, advise):
    made.append(config)
    found = estimate.estimate(config, where, job)
    memory = plan.cost.Memory(found.peak, 0.0, 0.0, 0.0, 0.0)
    bounds = plan.cost.Bounds(config.batch_size / (10.0 if config.remat == "full" else 5.0), 0.0, 0.0, 0.0)
    costs = (plan.Cost("step", memory, {"dit": 1.0}, 0.0, (), bounds, 0.0),)
    return plan.Plan(job, where, config.mesh.to_dict(), config.batch_size, config.remat, costs, 0.0)

  monkeypatch.setattr(plan, "make", compiled)
  search.run(small.config(tmp_path), "v5e:2x2")
  out = capsys.readouterr().out
  assert len(made) == 3 and out.count("images/s, by compute") == 3
  best = max(made, key=lambda config: config.remat == "full")
  assert f"the best: --config.batch_size={best.batch_size} --config.mesh.data={best.mesh.data}" in out


def test_the_best_do_not_fit_after_all(tmp_path, where, monkeypatch):
  monkeypatch.setattr(search, "BATCHES", (1,))
  refused = lambda config, name, **_: plan.Plan("train", where, {}, config.batch_size, config.remat, (), 2.0**30)
  monkeypatch.setattr(plan, "make", refused)
  for as_json in (False, True):
    with pytest.raises(CheckFailed, match="none of the best fits v5e:2x2"):
      search.run(small.config(tmp_path), "v5e:2x2", as_json=as_json)


def test_nothing_fits(tmp_path, where, monkeypatch):
  monkeypatch.setattr(search, "BATCHES", (1,))
  monkeypatch.setitem(topology.CHIPS, "v5e", dataclasses.replace(where.chip, hbm=2**20))
  with pytest.raises(CheckFailed, match="nothing that was tried fits v5e:2x2"):
    search.run(small.config(tmp_path), "v5e:2x2")
