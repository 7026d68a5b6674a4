"""The estimate against what the compiler said of the real sizes (the cells of the README's table)."""

import json
from pathlib import Path

import pytest

from blip3o_jax.planning import estimate, table, topology
from blip3o_jax.training.config import load_config

ROOT = Path(__file__).resolve().parents[2]
KNOWN = table.read(ROOT / "blip3o_jax" / "assets" / "plans")
# Many cells are one program: that of other data, or of another number of hosts that do the same.
PROGRAMS: dict[str, list[str]] = {}
for cell, record in sorted(KNOWN.items()):
  PROGRAMS.setdefault(json.dumps(record["made"], sort_keys=True), []).append(cell)


@pytest.mark.parametrize("cells", PROGRAMS.values(), ids="+".join)
def test_memory_within_a_tenth_of_the_compilers(cells):
  pytest.importorskip("libtpu")
  config, first = table.cell_config(cells[0], ROOT / "configs"), KNOWN[cells[0]]
  guess = estimate.estimate(config, topology.get(first["topology"]), first["job"])
  for cell in cells:
    assert guess.peak == pytest.approx(KNOWN[cell]["peak_bytes"], rel=0.1), cell


@pytest.mark.parametrize(
  "name, batch, compiled",
  [
    ("v5e:16x16", 512, 173_822_464 + 1_474_843_136 + 115_953_664),
    ("v5e:8x8", 128, 596.7 * 2**20 + 959.7 * 2**20 + 81.6 * 2**20),
  ],
)
def test_memory_with_two_images_a_chip(name, batch, compiled):
  """configs/pretrain_8b.py, a fourth of the table's batch: arguments, temporaries and code by libtpu 0.0.42.1 on
  2026-11-29."""
  pytest.importorskip("libtpu")
  config = load_config(ROOT / "configs" / "pretrain_8b.py", [f"--config.batch_size={batch}"])
  assert estimate.estimate(config, topology.get(name), "train").peak == pytest.approx(compiled, rel=0.1)
