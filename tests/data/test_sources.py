import io
import json
import pickle
import tarfile

import grain
import pytest

from blip3o_jax.data.sources import JsonlSource, TarSource
from blip3o_jax.errors import UserError


def write_tar(path, members, mode="w"):
  with tarfile.open(path, mode) as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path


def pair(key, text=b"a circle"):
  return [(f"{key}.jpg", key.encode() * 3), (f"{key}.txt", text)]


def test_reads_samples_of_all_shards_in_order(tmp_path):
  write_tar(tmp_path / "b.tar", pair("dir/x.y") + pair("k3", "déjà vu ".encode()))
  write_tar(
    tmp_path / "a.tar", [("k1.txt", b"one"), ("k1.jpg", b"I"), ("k1.json", b"{}"), ("k2.PNG", b"J"), ("k2.txt", b"two")]
  )
  source = TarSource(tmp_path)
  assert isinstance(source, grain.sources.RandomAccessDataSource) and len(source) == 4
  assert [source[i]["text"] for i in range(4)] == ["one", "two", "a circle", "déjà vu"]
  assert [source[i]["image"] for i in range(2)] == [b"I", b"J"]
  assert source[3]["name"].endswith("b.tar: k3")


def test_long_names(tmp_path):
  write_tar(tmp_path / "a.tar", pair("f" * 150))
  assert TarSource(tmp_path / "a.tar")[0]["text"] == "a circle"


def test_pickles_without_open_files(tmp_path):
  source = TarSource(write_tar(tmp_path / "a.tar", pair("k")))
  assert source[0]["text"] == pickle.loads(pickle.dumps(source))[0]["text"]


def test_index_is_cached_and_follows_the_shard(tmp_path, monkeypatch):
  path = write_tar(tmp_path / "a.tar", pair("k"))
  TarSource(path)
  with monkeypatch.context() as patch:
    patch.setattr(tarfile, "open", lambda *a, **k: 1 / 0)
    assert len(TarSource(path)) == 1
  write_tar(path, pair("k") + pair("l"))
  assert len(TarSource(path)) == 2
  (tmp_path / ".index" / "a.tar.npz").write_bytes(b"damaged")
  assert len(TarSource(path)) == 2


@pytest.mark.parametrize("cut", [700, 1800, 2600])
def test_truncated_tar(tmp_path, cut):
  path = write_tar(tmp_path / "cut.tar", [("k.jpg", b"i" * 900), ("k.txt", b"c" * 600)])
  path.write_bytes(path.read_bytes()[:cut])
  with pytest.raises(UserError, match=r"cut\.tar is truncated"):
    TarSource(path)


def test_structure_errors_name_shard_and_member(tmp_path):
  with pytest.raises(UserError, match=r"one\.tar: k2 has no caption"):
    TarSource(write_tar(tmp_path / "one.tar", pair("k1") + [("k2.jpg", b"i")]))
  with pytest.raises(UserError, match=r"two\.tar: k2 has no image"):
    TarSource(write_tar(tmp_path / "two.tar", pair("k1") + [("k2.txt", b"i")]))
  with pytest.raises(UserError, match=r"twice.*|k1.*twice"):
    TarSource(write_tar(tmp_path / "three.tar", pair("k1") + pair("k1")))
  with pytest.raises(UserError, match="compressed"):
    TarSource(write_tar(tmp_path / "four.tar", pair("k1"), "w:gz"))
  with pytest.raises(UserError, match="no samples"):
    TarSource(write_tar(tmp_path / "five.tar", []))
  with pytest.raises(UserError, match="no tar shards"):
    TarSource(tmp_path / "nowhere")


def test_caption_that_is_not_utf8_fails_when_read(tmp_path):
  source = TarSource(write_tar(tmp_path / "a.tar", pair("good") + pair("bad", b"\xff\xfe\xff")))
  assert source[0]["text"] == "a circle"
  with pytest.raises(UserError, match=r"a\.tar: bad\.txt is not UTF-8"):
    source[1]


def test_jsonl(tmp_path):
  (tmp_path / "pictures").mkdir()
  (tmp_path / "pictures" / "0.jpg").write_bytes(b"IMAGE")
  lines = [
    json.dumps({"image": "pictures/0.jpg", "caption": "ü"}, ensure_ascii=False),
    json.dumps({"image": None}),
    "{",
    "3",
  ]
  lines += [json.dumps({"image": "pictures/1.jpg"})]
  (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
  source = JsonlSource(tmp_path / "rows.jsonl")
  assert len(source) == 5
  assert source[0]["image"] == b"IMAGE" and source[0]["caption"] == "ü" and source[1]["image"] is None
  for i, message in ((2, "line 3 is not JSON"), (3, "line 4 is not a JSON object"), (4, "pictures/1.jpg")):
    with pytest.raises(UserError, match=message):
      source[i]
  with pytest.raises(UserError, match="no such file"):
    JsonlSource(tmp_path / "none.jsonl")
