"""Folders for official scorers: drawn by the tiny model, and read here as the scorers' own code reads them."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.errors import UserError
from blip3o_jax.evaluation import dpg, geneval, mjhq, wise
from blip3o_jax.jobs import generate


def draw(directory, module, source, out, num):
  return generate.run(directory, module.Prompts(source), out, num=num, batch_size=2)


def test_geneval(tiny_directory, tmp_path):
  """evaluate_images.py: folders of digits, one JSON object in metadata.jsonl, samples/ of digits.png."""
  rows = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
  ]
  (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
  images = tmp_path / "out" / "images"
  (images / "00001").mkdir(parents=True)
  (images / "00001" / ".grid.png.0a1b2c3d.tmp").write_bytes(b"of a killed process")
  draw(tiny_directory, geneval, tmp_path / "m.jsonl", tmp_path / "out", num=4)
  assert sorted(os.listdir(images)) == ["00000", "00001"]
  for folder, row in zip(sorted(images.iterdir()), rows, strict=True):
    with open(folder / "metadata.jsonl") as file:
      assert json.load(file) == row
    samples = sorted(os.listdir(folder / "samples"))
    assert len(samples) == 4 and all(re.fullmatch(r"\d+\.png", name) for name in samples)
    grid = np.asarray(Image.open(folder / "grid.png"))
    assert grid.shape == (32, 32, 3) and sorted(os.listdir(folder)) == ["grid.png", "metadata.jsonl", "samples"]
    assert np.array_equal(grid[:16, 16:], np.asarray(Image.open(folder / "samples" / samples[1])))


def test_dpg(tiny_directory, tmp_path):
  """compute_dpg_bench.py: every file of the folder is a sheet ITEM.png, cut at the resolution, first row first."""
  (tmp_path / "prompts").mkdir()
  for item in ("1", "drawbench_12"):
    (tmp_path / "prompts" / f"{item}.txt").write_text(f"{item} red circles\n")
  (tmp_path / "out" / "images").mkdir(parents=True)
  (tmp_path / "out" / "images" / ".1.png.0a1b2c3d.tmp").write_bytes(b"of a killed process")
  draw(tiny_directory, dpg, tmp_path / "prompts", tmp_path / "out", num=4)
  assert sorted(os.listdir(tmp_path / "out" / "images")) == ["1.png", "drawbench_12.png"]
  sheet = Image.open(tmp_path / "out" / "images" / "drawbench_12.png")
  for n, box in enumerate([(0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 16, 32), (16, 16, 32, 32)]):
    one = Image.open(tmp_path / "out" / "samples" / f"drawbench_12-{n}.png")
    assert np.array_equal(np.asarray(sheet.crop(box)), np.asarray(one))
  with pytest.raises(UserError, match="3 pictures a prompt; the scorer takes 4 or 1"):
    draw(tiny_directory, dpg, tmp_path / "prompts", tmp_path / "three", num=3)
  with pytest.raises(UserError, match="holds no .txt prompts"):
    dpg.Prompts(tmp_path)


def test_wise(tiny_directory, tmp_path):
  """gpt_eval.py: IMAGE_DIR/{prompt_id}.png for every row of the file."""
  (tmp_path / "data").mkdir()
  for start, name in enumerate(wise.FILES):
    rows = [{"Prompt": "a circle", "prompt_id": i + 400 * start, "Explanation": "round"} for i in (1, 2)]
    (tmp_path / "data" / name).write_text(json.dumps(rows))
  (tmp_path / "data" / "natural_science_rewrite.json").write_text("[]")
  draw(tiny_directory, wise, tmp_path / "data", tmp_path / "out", num=1)
  assert sorted(os.listdir(tmp_path / "out" / "images")) == [f"{i}.png" for i in (1, 2, 401, 402, 801, 802)]
  assert len(wise.Prompts(tmp_path / "data" / wise.FILES[0])) == 2
  with pytest.raises(UserError, match="is not of WISE"):
    wise.Prompts(tmp_path / "data" / "natural_science_rewrite.json")
  with pytest.raises(UserError, match="cannot be read as JSON"):
    wise.Prompts(tmp_path / "none.json")
  for bad in ([1], None, True, 1.5):
    (tmp_path / "bad.json").write_text(json.dumps([{"Prompt": "a circle", "prompt_id": bad}]))
    with pytest.raises(UserError, match="is not of WISE"):
      wise.Prompts(tmp_path / "bad.json")
  (tmp_path / "data" / wise.FILES[1]).unlink()  # of a folder all of it, or the score is of something else
  with pytest.raises(UserError, match=wise.FILES[1]):
    wise.Prompts(tmp_path / "data")


def test_mjhq(tiny_directory, tmp_path):
  """One picture an id, in the folder of its category."""
  rows = {"0ab": {"category": "animals", "prompt": "a red cat"}, "1cd": {"category": "logo", "prompt": "a circle"}}
  (tmp_path / "meta_data.json").write_text(json.dumps(rows | {"2ef": {"category": "logo"}}))
  with pytest.raises(UserError, match="1 of 3 rows could not be used"):
    draw(tiny_directory, mjhq, tmp_path / "meta_data.json", tmp_path / "out", num=1)
  images = tmp_path / "out" / "images"
  assert sorted(str(p.relative_to(images)) for p in images.rglob("*.png")) == ["animals/0ab.png", "logo/1cd.png"]
  (tmp_path / "list.json").write_text("[]")
  with pytest.raises(UserError, match="is not of MJHQ-30K"):
    mjhq.Prompts(tmp_path / "list.json")
