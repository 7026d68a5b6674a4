"""The table: cells are kept, old ones are made again, and what is shown is what is there."""

import json
import re
from pathlib import Path

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.planning import plan, table

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "blip3o_jax" / "assets" / "plans"


def test_cells_are_kept_and_old_ones_made_again(tmp_path, monkeypatch, capsys):
  pytest.importorskip("libtpu")
  record = json.loads((KEPT / "pretrain-8b-v5e-64.json").read_text())
  made = []
  monkeypatch.setattr(plan, "make", lambda config, name, **_: made.append((config.batch_size, name)) or config)
  monkeypatch.setattr(plan, "record", lambda found: {k: v for k, v in record.items() if k not in ("cell", "made")})
  cells = ["pretrain-8b:v5e:64", "pretrain-8b:v4:256", "instruct-8b:v5e:64"]
  table.run(tmp_path, ROOT / "configs", cells)
  assert made == [(512, "v5e:8x8"), (2048, "v4:4x8x8")]  # instruction tuning is the same program on other data
  assert set(table.read(tmp_path)) == set(cells)
  table.run(tmp_path, ROOT / "configs", cells)
  assert len(made) == 2  # nothing to do
  path = tmp_path / "pretrain-8b-v4-256.json"
  for count, old in enumerate(("config", "libtpu", "jax", "counting"), start=3):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"made": content["made"] | {old: "another"}}))
    table.run(tmp_path, ROOT / "configs", cells)
    assert made[2:] == [(2048, "v4:4x8x8")] * (count - 2)
  shown = (tmp_path / "table.md").read_text()
  assert "| pretraining 8B, 8 | v5e |" in shown and "not measured speeds" in shown and "4B" not in shown
  assert "polyline" in (tmp_path / "scaling.svg").read_text()
  own = ["features-8b:v5e:64", "features-8b:v5e:256"]
  table.run(tmp_path, ROOT / "configs", own)
  assert made[6:] == [(1024, "v5e:8x8")]  # hosts that do the same, each for itself
  few, many = (table.read(tmp_path)[cell] for cell in own)
  assert (many["images"], many["topology"]) == (4096, "v5e:16x16") and many["programs"] == few["programs"]
  assert many["bound_images_per_second"] == 4096 / few["bound_seconds"]
  with pytest.raises(UserError, match="is no cell"):
    table.run(tmp_path, ROOT / "configs", ["pretrain-9b:v5e:64"])


def test_a_cell_that_does_not_fit_says_by_how_much():
  made = {"libtpu": "0.1", "jax": "0.11", "date": "2026-11-29"}
  record = {"fits": False, "short_bytes": 3 * 2**30, "programs": [], "made": made}
  assert "no fit, 3.0 GiB short" in table.markdown({"pretrain-8b:v5e:8": record})


def test_the_readme_shows_the_table_that_is_kept():
  rows = [line for line in (KEPT / "table.md").read_text().splitlines() if re.match(r"\| \w", line)]
  readme = (ROOT / "README.md").read_text()
  assert rows and all(row in readme for row in rows)
  assert (KEPT / "table.md").read_text() == table.markdown(table.read(KEPT))
