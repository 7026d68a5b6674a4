"""Captions into shards: real tars in, real tars out, which the pretraining source reads."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax.data import tars
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import UserError
from blip3o_jax.inference.model import Model
from blip3o_jax.jobs import caption


def picture(seed, format="JPEG", side=24):
  image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))
  buffer = io.BytesIO()
  image.save(buffer, format)
  return buffer.getvalue()


@pytest.fixture
def data(tmp_path):
  """Two shards, five pictures, one of them broken; the first has captions, the second pictures alone."""
  contents = [picture(0), picture(1, "PNG"), b"broken", picture(3), picture(4, "WEBP")]
  for shard, keys in enumerate(([0, 1, 2], [3, 4])):
    members = [(f"{key}.jpg", contents[key]) for key in keys]
    members += [(f"{key}.txt", b"an old caption") for key in keys if shard == 0]
    tars.write(tmp_path / "data" / f"{shard}.tar", members)
  return tmp_path / "data", contents


def test_shards_that_pretraining_reads(tiny_directory, data, tmp_path, monkeypatch, capsys):
  folder, contents = data
  monkeypatch.setitem(caption.STYLES, "long", (caption.STYLES["long"][0], 6))  # six tokens do
  asked, real = [], Model.reply
  monkeypatch.setattr(
    Model, "reply", lambda self, rows, *args, **kw: asked.append(len(rows)) or real(self, rows, *args, **kw)
  )
  with pytest.raises(UserError, match="1 of 5 pictures could not be used, the others are done"):
    caption.run(tiny_directory, folder, tmp_path / "out", batch_size=2)
  assert asked == [2, 1, 1]  # not one by one, though each is a part; the third is the broken one
  assert capsys.readouterr().err.count("blip3o: ") == 1
  source = open_source(str(tmp_path / "out" / "shards"))
  model = blip3o_jax.load(tiny_directory)
  want = [
    model.chat([{"role": "user", "content": [Image.open(io.BytesIO(c)), caption.STYLES["long"][0]]}], max_new_tokens=6)
    for c in contents
    if c != b"broken"
  ]
  assert [source[i]["text"] for i in range(len(source))] == want
  assert [source[i]["image"] for i in range(len(source))] == [c for c in contents if c != b"broken"]
  records = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
  assert [r["row"] for r in records] == [0, 1, 2, 3, 4] and "error" in records[2]
  assert [r["caption"] for r in records if "error" not in r] == want

  # Going on: one shard is missing, and only its pictures are read again.
  asked.clear()
  (tmp_path / "out" / "parts" / "000003.jsonl").unlink()
  with pytest.raises(UserError, match="1 of 5"):
    caption.run(tiny_directory, folder, tmp_path / "out", batch_size=2)
  assert asked == [1] and [source[i]["text"] for i in range(len(source))] == want
  with pytest.raises(UserError, match="holds another job: its prompt was"):
    caption.run(tiny_directory, folder, tmp_path / "out", prompt="what is it?")
  with pytest.raises(UserError, match="style 'tiny' is unknown; choose one of long, short"):
    caption.run(tiny_directory, folder, tmp_path / "out", style="tiny")
