import io
import json
import pickle
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from blip3o_jax.data.sources import SourceConfig, open_source
from blip3o_jax.errors import UserError


def png(value):
  buffer = io.BytesIO()
  Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
  return buffer.getvalue()


def write_records(path, records):
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return path


def test_jsonl(tmp_path):
  (tmp_path / "pictures").mkdir()
  (tmp_path / "pictures" / "0.jpg").write_bytes(b"IMAGE")
  lines = [
    json.dumps({"image": "pictures/0.jpg", "caption": "ü"}, ensure_ascii=False),
    json.dumps({"image": None}),
    "{",
    "3",
    json.dumps({"image": "pictures/1.jpg"}),
    json.dumps({"image": 7}),
    "[" * 100_000,
  ]
  (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
  source = pickle.loads(pickle.dumps(open_source(tmp_path / "rows.jsonl")))
  assert len(source) == 7
  assert source[0]["image"] == b"IMAGE" and source[0]["text"] == "ü" and source[1]["image"] is None
  for i, message in (
    (2, "line 3 is not JSON"),
    (3, "line 4 is not a JSON object"),
    (4, "pictures/1.jpg"),
    (5, "line 6: its picture is 7, not a path"),
    (6, "line 7 is not JSON"),
  ):
    with pytest.raises(UserError, match=message):
      source[i]
  with pytest.raises(UserError, match="nothing at .*none.jsonl"):
    open_source(tmp_path / "none.jsonl")
  (tmp_path / "empty.jsonl").write_text("\n")
  with pytest.raises(UserError, match="empty.jsonl has no rows"):
    open_source(tmp_path / "empty.jsonl")


def test_fields_and_folder_of_a_jsonl_as_journeydb_has_them(tmp_path):
  """train_caption_only.jsonl with caption and img_path, pictures under imgs (spec 11.2); here in two files."""
  (tmp_path / "imgs").mkdir()
  for i in range(3):
    (tmp_path / "imgs" / f"{i}.jpg").write_bytes(b"%d" % i)
  rows = [json.dumps({"caption": f"caption {i}", "img_path": f"./{i}.jpg"}) + "\n" for i in range(3)]
  (tmp_path / "a.jsonl").write_text(rows[0])
  (tmp_path / "b.jsonl").write_text(rows[1] + rows[2])
  cfg = SourceConfig(str(tmp_path / "{a,b}.jsonl"), image="img_path", text="caption", root=str(tmp_path / "imgs"))
  source = open_source(cfg)
  assert [source[i]["image"] for i in range(3)] == [b"0", b"1", b"2"]
  assert [source[i]["text"] for i in range(3)] == [f"caption {i}" for i in range(3)]
  assert source[2]["name"].endswith("b.jsonl: line 2")
  with pytest.raises(UserError, match="line 1 has no field 'words'; there are caption, img_path"):
    open_source(SourceConfig(str(tmp_path / "a.jsonl"), text="words"))[0]


def test_array_record(tmp_path):
  rows = [{"image": png(i), "text": f"caption {i}"} for i in range(5)]
  write_records(tmp_path / "x.array_record-00000-of-00002", [msgpack.packb(row) for row in rows[:3]])
  write_records(tmp_path / "x.array_record-00001-of-00002", [msgpack.packb(rows[3]), b"\xc1", msgpack.packb([1])])
  source = pickle.loads(pickle.dumps(open_source(tmp_path)))
  assert len(source) == 6 and [source[i]["text"] for i in range(4)] == [row["text"] for row in rows[:4]]
  assert source[3]["image"] == rows[3]["image"]
  with pytest.raises(UserError, match="00001-of-00002: record 1 is not msgpack"):
    source[4]
  with pytest.raises(UserError, match="00001-of-00002: record 2 is not a msgpack map"):
    source[5]
  rows = [{"image": "0.jpg"}, {"image": [1, 2]}, {"image": None}]
  source = open_source(write_records(tmp_path / "y.array_record", [msgpack.packb(row) for row in rows]))
  for i, kind in enumerate(("str", "list")):
    with pytest.raises(UserError, match=f"y.array_record: record {i}: its picture is a {kind}, not the bytes"):
      source[i]
  assert source[2]["image"] is None


def test_array_record_that_is_none_or_is_damaged(tmp_path):
  (tmp_path / "a.array_record").write_bytes(b"not at all" * 1000)
  path = write_records(tmp_path / "0.array_record", [b""])
  with pytest.raises(UserError, match="a.array_record"):
    open_source(SourceConfig((str(path), str(tmp_path / "a.array_record"))))[1]
  path = write_records(tmp_path / "b.array_record", [np.random.default_rng(i).bytes(100_000) for i in range(4)])
  source = open_source(path)
  content = bytearray(path.read_bytes())
  content[150_000:250_000] = bytes(100_000)
  path.write_bytes(content)
  with pytest.raises(UserError, match="record 1"):
    source[1]


TFDS = """
import io, numpy, sys
import tensorflow_datasets as tfds
from PIL import Image

class Tiny(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self):
    features = {"picture": tfds.features.Image(shape=(None, None, 3)), "words": tfds.features.Text()}
    features["number"] = tfds.features.Scalar(numpy.int64)
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
  def _split_generators(self, _):
    return {"train": self._generate_examples(3), "test": self._generate_examples(2)}
  def _generate_examples(self, n):
    for i in range(n):
      file = io.BytesIO()
      Image.new("RGB", (8, 8), (i, 0, 0)).save(file, "PNG")
      file.seek(0)
      yield i, {"picture": file, "words": f"caption {i}, é", "number": i}

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_tfds(tmp_path):
  (tmp_path / "code").mkdir()
  (tmp_path / "code/tiny.py").write_text(TFDS)
  subprocess.run([sys.executable, tmp_path / "code/tiny.py", tmp_path / "data"], check=True, capture_output=True)
  folder = str(tmp_path / "data/tiny/1.0.0")
  source = pickle.loads(pickle.dumps(open_source(SourceConfig(folder, image="picture", text="words"))))
  found = {source[i]["text"]: source[i]["image"] for i in range(3)}
  assert len(source) == 3 and found == {f"caption {i}, é": png(i) for i in range(3)}
  assert "tensorflow" not in sys.modules
  assert len(open_source(SourceConfig(folder, image="picture", text="words", split="test"))) == 2
  with pytest.raises(UserError, match="train 0: its picture is a .*int.*, not the bytes"):
    open_source(SourceConfig(folder, image="number"))[0]
  with pytest.raises(UserError, match="no feature 'image'; there are .*words"):
    open_source(folder)
  with pytest.raises(UserError, match="split 'dev'"):
    open_source(SourceConfig(folder, image="picture", split="dev"))
  with pytest.raises(UserError, match="no_such_set"):
    open_source("tfds:no_such_set")
  with pytest.raises(UserError, match="no_such_set, split 'train'"):
    open_source(SourceConfig(("tfds:no_such_set",)))
  assert len(open_source(SourceConfig((folder,), image="picture"))) == 3
  with pytest.raises(UserError, match="1.0.0 cannot be read as one with others; name each of them under data.sources"):
    open_source(SourceConfig((folder, str(tmp_path / "code")), image="picture"))


def test_what_a_path_means(tmp_path):
  with pytest.raises(UserError, match="nothing at .*/none"):
    open_source(tmp_path / "none")
  with pytest.raises(UserError, match="the folder holds neither .tar"):
    open_source(tmp_path)
  (tmp_path / "a.jsonl").write_text("{}")
  (tmp_path / "b.txt").write_text("")
  with pytest.raises(UserError, match="b.txt is no data that is known here"):
    open_source(tmp_path / "b.txt")
  assert len(open_source(tmp_path)) == 1
  (tmp_path / "c.tar").write_bytes(b"")
  with pytest.raises(UserError, match="several kinds .jsonl, tar"):
    open_source(tmp_path)
  with pytest.raises(UserError, match="nothing at .*/2.jsonl"):
    open_source(SourceConfig((str(tmp_path / "a.jsonl"), str(tmp_path / "{2,3}.jsonl"))))
  with pytest.raises(UserError, match="{3..1} counts down"):
    open_source(tmp_path / "{3..1}.jsonl")


def test_a_bucket_without_the_package_for_it_says_what_to_install():
  with pytest.raises(UserError, match="gcsfs"):
    open_source("gs://no-such-bucket/shards/*.tar")
