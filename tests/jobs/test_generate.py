"""Pictures for a file of prompts, drawn by the tiny model: files, manifest, going on, and bad rows."""

import io
import json
import os
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax.data.inputs import PromptFile
from blip3o_jax.errors import UserError
from blip3o_jax.inference.model import Model
from blip3o_jax.jobs import generate
from blip3o_jax.porting.source import Source

PROMPTS = ["a red circle", "two circles", "a green cross", "a circle left of a square", "zwölf Kreise"]


@pytest.fixture
def drawn(monkeypatch):
  """How many pictures were drawn."""
  count, real = [], Model.draw

  def draw(self, rows, *args):
    count.append(len(rows))
    return real(self, rows, *args)

  monkeypatch.setattr(Model, "draw", draw)
  return count


def write(path, *rows):
  path.write_text(
    "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
  )
  return path


def run(directory, file, out, **options):
  return generate.run(directory, generate.Rows(file), out, **{"num": 2, "batch_size": 2, **options})


def pixels(path):
  return np.asarray(Image.open(path))


def test_every_picture_of_every_prompt(tiny_directory, tmp_path, drawn, capsys):
  """As `Model.generate` draws it; its file says what it is, and so does the manifest."""
  nothing = {"prompt": PROMPTS[0], "seed": None, "image": None}  # as tables that lack them are written
  file = write(tmp_path / "p.jsonl", nothing, "", *({"prompt": p, "seed": 7} for p in PROMPTS[1:]))
  told = run(tiny_directory, file, tmp_path / "out", seed=3)
  assert told == str(tmp_path / "out" / "manifest.jsonl") and drawn == [2] * 5
  assert "10 of 10 pictures" in capsys.readouterr().err
  records = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
  assert [(r["row"], r["number"], r["prompt"]) for r in records] == [
    (i, n, p) for i, p in enumerate(PROMPTS) for n in (0, 1)
  ]
  assert [r["seed"] for r in records] == [3, 3] + [7] * 8
  assert records[3]["file"] == "pictures/00000/00000001-1.png" and records[0]["settings"]["steps"] == 2
  model = blip3o_jax.load(tiny_directory)
  model.batch_size = 2
  want = model.generate(PROMPTS, num=2, seed=[3, 7, 7, 7, 7])
  for record in records:
    picture = tmp_path / "out" / record["file"]
    assert np.abs(pixels(picture).astype(int) - want[record["row"]][record["number"]]).max() <= 1
    text = Image.open(picture).text
    assert (text["prompt"], text["seed"], text["model"]) == (record["prompt"], str(record["seed"]), model.digest)
    assert json.loads(text["settings"]) == record["settings"] and text["number"] == str(record["number"])


def test_a_batch_that_does_not_divide_over_the_mesh_is_made_larger(tiny_directory, tmp_path, drawn, monkeypatch):
  """What it would be filled up with costs as much as pictures that are asked for."""
  monkeypatch.setattr(Model, "rounded", lambda self, size: -(-size // 2) * 2)  # as on two devices
  run(tiny_directory, write(tmp_path / "p.jsonl", {"prompt": PROMPTS[0]}), tmp_path / "out", num=4, batch_size=1)
  assert drawn == [2, 2]


def test_going_on_draws_what_is_missing(tiny_directory, tmp_path, drawn):
  """After a kill: what is there stays, what was half-written goes, and another start does nothing."""
  file, out = write(tmp_path / "p.jsonl", *({"prompt": p} for p in PROMPTS)), tmp_path / "out"
  run(tiny_directory, file, out)
  pictures = sorted(out.rglob("*.png"))
  before = {path: path.read_bytes() for path in pictures}
  (out / "manifest.jsonl").unlink()
  for part in (1, 3):
    (out / "parts" / f"{part:06d}.jsonl").unlink()
  pictures[2].unlink()
  pictures[7].unlink()
  half = pictures[2].with_name(f".{pictures[2].name}.123.tmp")
  half.write_bytes(before[pictures[2]][:100])
  marked = pictures[6].stat().st_mtime_ns
  drawn.clear()
  run(tiny_directory, file, out)
  assert drawn == [2] and not half.exists() and pictures[6].stat().st_mtime_ns == marked
  assert sorted(out.rglob("*.png")) == pictures
  assert len((out / "manifest.jsonl").read_text().splitlines()) == 10
  difference = pixels(pictures[2]).astype(int) - np.asarray(Image.open(io.BytesIO(before[pictures[2]])))
  assert np.abs(difference).max() <= 1
  drawn.clear()
  run(tiny_directory, file, out)
  assert drawn == []
  with pytest.raises(UserError, match="out holds another job: its seed was 0, is 1"):
    run(tiny_directory, file, out, seed=1)
  write(file, {"prompt": "another"})
  with pytest.raises(UserError, match="prompts was"):
    run(tiny_directory, file, out)


def test_bad_rows_leave_the_others_unharmed(tiny_directory, tmp_path, capsys):
  Image.new("RGB", (24, 24), (200, 30, 20)).save(tmp_path / "red.png")
  (tmp_path / "broken.jpg").write_bytes(b"no picture")
  file = write(
    tmp_path / "p.jsonl",
    {"prompt": "a red circle"},
    '{"prompt": "a gr',
    {"prompt": " "},
    {"prompt": "circle " * 10000},
    {"text": "a circle"},
    {"prompt": "a", "seed": -1},
    {"prompt": "make it blue", "image": "red.png"},
    {"prompt": "make it blue", "image": "broken.jpg"},
    {"prompt": "make it blue", "image": "nowhere.png"},
    {"prompt": "make it blue", "image": 5},
    "[1, 2]",
    "\xff\xfe",
  )
  with pytest.raises(UserError, match="10 of 12 rows could not be used, the others are done; grep"):
    run(tiny_directory, file, tmp_path / "out")
  words = [
    "line 2 is not JSON",
    "line 3 has an empty prompt",
    "row 3: the prompt has 10030 tokens, 4096 are the most",
    "line 5 is not a row",
    "line 6: seed -1",
    "broken.jpg: not an image",
    "nowhere.png: no such image",
    'line 10: "image" is no path',
    "line 11 is not a row",
    "line 12 is not JSON",
  ]
  told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("blip3o: ")]
  assert len(told) == 10 and all(word in line for word, line in zip(words, told, strict=True))
  records = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
  assert [r["row"] for r in records if "error" not in r] == [0, 0, 6, 6]
  assert len(list((tmp_path / "out").rglob("*.png"))) == 4
  with pytest.raises(UserError, match="10 of 12 rows") as told:  # and says so again
    run(tiny_directory, file, tmp_path / "out")
  Image.new("RGB", (24, 24)).save(tmp_path / "nowhere.png")
  subprocess.run(re.search("`(.*)`", str(told.value))[1], shell=True, check=True)
  with pytest.raises(UserError, match="9 of 12 rows"):
    run(tiny_directory, file, tmp_path / "out")


def test_what_stops_a_job_at_once(tiny_directory, tmp_path, monkeypatch):
  file = write(tmp_path / "p.jsonl", {"prompt": "a"})
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(OSError):
    run(tiny_directory, file, tmp_path / "file" / "out")
  monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
  with pytest.raises(UserError, match="out cannot be written"):
    run(tiny_directory, file, tmp_path / "out")
  monkeypatch.undo()
  for settings, words in [
    ({"steps": -1}, "steps are -1"),
    ({"guidance": 1e9}, "take 0 to 100"),
    ({"sparkle": 1}, "sparkle"),
  ]:
    with pytest.raises(UserError, match=words):
      run(tiny_directory, file, tmp_path / "out", settings=settings)
  with pytest.raises(UserError, match="mount the bucket"):
    run(tiny_directory, file, "gs:/bucket/out")
  with pytest.raises(UserError, match="no such file"):
    PromptFile(tmp_path / "none.jsonl")
  with pytest.raises(UserError, match="holds no prompts"):
    PromptFile(write(tmp_path / "empty.jsonl", "", " "))


def test_a_few_by_name(tiny_directory, tmp_path, drawn, monkeypatch):
  monkeypatch.setattr(Source, "content_hash", None)  # no weights are read for a label
  options = {"num": 3, "seed": 3, "batch_size": 2, "settings": {"wording": "paper"}}
  told = list(generate.draw_few(tiny_directory, PROMPTS[:1], tmp_path, **options))
  assert [(path.name, prompt) for path, prompt in told] == [(f"000-{n}.png", PROMPTS[0]) for n in range(3)]
  assert drawn == [2, 2]
  text = Image.open(told[0][0]).text
  assert json.loads(text["settings"])["wording"] == "paper" and text["model"] == str(tiny_directory)
