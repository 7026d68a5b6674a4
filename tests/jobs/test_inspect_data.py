import io
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from blip3o_jax.data import shapes_corpus, tars
from blip3o_jax.data.vision import ImageProcessor, patch_numbers
from blip3o_jax.jobs import inspect_data
from blip3o_jax.training.defaults import complete

SIZES = {"contrastive": 0, "pretrain": 30, "instruct": 12, "understanding": 20, "text_only": 4, "held_out": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return shapes_corpus.make_shapes(tmp_path_factory.mktemp("corpus") / "shapes", **SIZES)


def experiment(**data):
  return complete(ConfigDict({"init_from": "micro", "batch_size": 8, "data": data}))


def inspected(config, out, num=40):
  lines = list(inspect_data.run(config, out, num=num, seconds=0.0))
  report = json.loads((out / "report.json").read_text())
  rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
  return "\n".join(lines), report, rows


def test_a_mixture_with_bad_samples_and_long_captions(corpus, tmp_path):
  members = []
  for i in range(10):
    file = io.BytesIO()
    Image.new("RGB", (90, 60), (10 * i, 0, 0)).save(file, "PNG")
    image = b"no picture" if i == 3 else file.getvalue()
    members += [(f"{i}.png", image), (f"{i}.txt", b"one two three " * (40 if i == 4 else 1))]
  tars.write(tmp_path / "own.tar", members)
  sources = {"shapes": {"path": str(corpus / "pretrain")}, "own": {"path": str(tmp_path / "own.tar")}}
  config = experiment(task="generation", sources=sources, max_length=60)
  text, report, rows = inspected(config, tmp_path / "out")
  facts = report["data"]
  assert facts["sources"]["shapes"] == {"samples": 30, "share": 0.75, "drawn": 30} and facts["looked_at"] == 40
  assert len(facts["bad"]) == 1 and "own.tar: 3" in facts["bad"][0] and facts["bad"][0] in text
  assert facts["tokens"]["truncated"] == pytest.approx(1 / 39) and facts["tokens"]["p100"] > 100
  assert "own: 10 samples, share 25.00%" in text and "cut to max_length 60" in text and "rows a second" in text
  long = [row for row in rows if row.get("cut")]
  assert len(long) == 1 and long[0]["prompt"].endswith("[IMG]") and long[0]["tokens"] == facts["tokens"]["p100"]
  assert sum(int(line.split()[3]) for line in text.splitlines() if " to " in line and "#" in line) == 39
  assert "Please generate image based on the following caption: " in rows[0]["prompt"]
  sheet = np.asarray(Image.open(tmp_path / "out/contact.png"))
  assert sheet.shape[1] > 1000 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 50


def test_groups_show_the_pictures_that_the_tower_gets(corpus, tmp_path):
  see = {"task": "conversations", "path": str(corpus / "understanding/questions.jsonl")}
  draw = {"task": "generation", "path": str(corpus / "pretrain"), "max_length": 44, "rows": 3}
  config = experiment(groups={"draw": draw, "see": see | {"max_length": 208, "max_patches": 64}})
  text, report, rows = inspected(config, tmp_path / "out", num=24)
  assert report["draw"]["looked_at"] == 18 and report["see"]["rows_of_a_batch"] == 2
  assert "draw: task generation, 6 rows of every batch" in text
  assert any("<|image_pad|> x 16" in row["prompt"] for row in rows if row["group"] == "see")


def test_captions_that_are_no_text_and_pictures_that_are_not_shown(corpus, tmp_path, monkeypatch):
  picture = Image.new("RGB", (8, 8))
  picture.save(tmp_path / "0.png")
  rows = [{"image": "0.png", "text": text} for text in (["a", "b"], 5, {"a": 1}, "\ud83d", *["a"] * 30)]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  sheet, shown = inspect_data._sheet, []
  monkeypatch.setattr(inspect_data, "_sheet", lambda samples: shown.extend(samples) or sheet(samples))
  _, report, found = inspected(experiment(task="images", path=str(tmp_path / "rows.jsonl")), tmp_path / "out", num=34)
  assert not report["data"]["bad"] and sum("text" not in row for row in found) == 3
  kept = [sample.picture is not None for sample in shown]
  assert kept == [True] * 24 + [False] * 10  # any number may be looked at in the memory of those on the sheet


def test_a_picture_comes_back_from_its_patches():
  processor = ImageProcessor(patch_size=8)
  pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
  patches, grid = processor(pixels)
  again = processor.picture(patches, patch_numbers([grid], patch_size=8)["patch_pos"])
  np.testing.assert_array_equal(again, pixels)
