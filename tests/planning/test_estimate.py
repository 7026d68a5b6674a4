"""The estimate against what the compiler said of the real sizes (the cells of the README's table)."""

from pathlib import Path

import pytest

from blip3o_jax.planning import estimate, table, topology
from blip3o_jax.training.config import load_config

ROOT = Path(__file__).resolve().parents[2]
KNOWN = table.read(ROOT / "blip3o_jax" / "assets" / "plans")


# Weights of 1792 and 3584 rows over 256 chips are no whole tiles: the compiler copies more than the estimate knows.
MISSED = ("pretrain-8b:v5e:256",)
LOW = lambda cell: pytest.mark.xfail(cell in MISSED, reason="40 % too low", strict=True)
GIVEN = [pytest.param(cell, marks=LOW(cell)) for cell in sorted(KNOWN)]


@pytest.mark.parametrize("cell", GIVEN)
def test_memory_within_a_tenth_of_the_compilers(cell):
  pytest.importorskip("libtpu")
  config = table.cell_config(cell, ROOT / "configs")
  guess = estimate.estimate(config, topology.get(KNOWN[cell]["topology"]), KNOWN[cell]["job"])
  assert guess.peak == pytest.approx(KNOWN[cell]["peak_bytes"], rel=0.1)


def test_memory_where_the_weights_are_cut_into_no_whole_tiles():
  """configs/pretrain_8b.py on v5e:16x16, 14 rows a chip: what the compiler (libtpu 0.0.52) said on 2026-11-21."""
  pytest.importorskip("libtpu")
  compiled = 173_822_464 + 1_254_309_888 + 112_056_832  # arguments, temporaries, code
  config = load_config(ROOT / "configs" / "pretrain_8b.py")
  assert estimate.estimate(config, topology.get("v5e:16x16"), "train").peak == pytest.approx(compiled, rel=0.1)
