import io
import os
import pickle
import resource
import tarfile

import buckets
import grain
import pytest

from blip3o_jax.data import tars
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.tars import index_shard
from blip3o_jax.errors import Problems, UserError


def write_tar(path, members, mode="w"):
  with tarfile.open(path, mode) as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path


def pair(key, text=b"a circle"):
  return [(f"{key}.jpg", key.encode() * 3), (f"{key}.txt", text)]


def test_writing(tmp_path):
  paths = [tmp_path / "new" / f"{name}.tar" for name in "ab"]
  for path in paths:
    tars.write(path, pair("k1") + pair("k2", b"two"))
  assert [sample["text"] for sample in open_source(paths[0])] == ["a circle", "two"]
  assert paths[0].read_bytes() == paths[1].read_bytes()
  with pytest.raises(ZeroDivisionError):
    tars.write(tmp_path / "half.tar", ((f"{1 / i}.jpg", b"") for i in (1, 0)))
  assert not list(tmp_path.glob("*half*"))


def test_reads_samples_of_all_shards_in_order(tmp_path):
  write_tar(tmp_path / "b.tar", pair("dir/x.y") + pair("k3", "déjà vu ".encode()))
  write_tar(
    tmp_path / "a.tar", [("k1.txt", b"one"), ("k1.jpg", b"I"), ("k1.json", b"{}"), ("k2.PNG", b"J"), ("k2.txt", b"two")]
  )
  source = open_source(tmp_path)
  assert isinstance(source, grain.sources.RandomAccessDataSource) and len(source) == 4
  assert [source[i]["text"] for i in range(4)] == ["one", "two", "a circle", "déjà vu"]
  assert [source[i]["image"] for i in range(2)] == [b"I", b"J"]
  assert source[3]["name"].endswith("b.tar: k3")


def test_long_names(tmp_path):
  write_tar(tmp_path / "a.tar", pair("f" * 150))
  assert open_source(tmp_path / "a.tar")[0]["text"] == "a circle"


def test_pickles_without_open_files(tmp_path):
  source = open_source(write_tar(tmp_path / "a.tar", pair("k")))
  assert source[0]["text"] == pickle.loads(pickle.dumps(source))[0]["text"]


def test_index_is_cached_and_follows_the_shard(tmp_path, monkeypatch):
  path = write_tar(tmp_path / "a.tar", pair("k"))
  open_source(path)
  with monkeypatch.context() as patch:
    patch.setattr(tarfile, "open", lambda *a, **k: 1 / 0)
    assert len(open_source(path)) == 1
  write_tar(path, pair("k") + pair("l"))
  assert len(open_source(path)) == 2
  for index in (tmp_path / ".index").iterdir():
    index.write_bytes(b"damaged")
  assert len(open_source(path)) == 2


def test_where_shards_cannot_be_written_the_index_goes_to_the_cache(tmp_path, monkeypatch):
  path = write_tar(tmp_path / "a.tar", pair("k") + pair("l"))
  (tmp_path / ".index").write_text("a file where the folder should be")  # root may write everywhere
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  assert len(open_source(path)) == 2 and list((tmp_path / "cache/blip3o_jax/index").iterdir())
  monkeypatch.setenv("XDG_CACHE_HOME", str(path))
  source = pickle.loads(pickle.dumps(open_source(path)))
  assert source[1]["name"].endswith("a.tar: l")


def test_a_shard_that_changes_while_in_use_gives_bad_samples_not_wrong_ones(tmp_path):
  path = write_tar(tmp_path / "a.tar", pair("k" * 600) + pair("l" * 300))
  source = open_source(path)
  write_tar(path, pair("m" * 300) + pair("n" * 600))
  with pytest.raises(UserError, match=r"a\.tar is not what its index says"):
    source[0]
  one = open_source(write_tar(tmp_path / "b.tar", [("k.jpg", b"i" * 100), ("k.txt", b"c")]))
  write_tar(tmp_path / "b.tar", [("k.jpg", b"i" * 90), ("k.txt", b"c")])  # all at the same places
  with pytest.raises(UserError, match=r"b\.tar is not what its index says"):
    one[0]
  os.truncate(path, 1024)
  with pytest.raises(UserError, match=r"a\.tar ends before byte"):
    source[1]
  path.unlink()
  with pytest.raises(UserError, match=r"a\.tar cannot be read: .*No such file"):
    source[1]


def test_many_shards_are_indexed_beforehand(tmp_path, monkeypatch):
  for i in range(3):
    write_tar(tmp_path / f"{i}.tar", pair("k") + pair("l")[: 2 - i % 2])
  (tmp_path / "cut.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
  done = []
  with pytest.raises(Problems, match="2 of 4 shards cannot be used, 2 problems:") as raised:
    for one in tars.index([str(tmp_path)], processes=2):
      done.append(one)
  assert sorted(done) == [(str(tmp_path / "0.tar"), 2), (str(tmp_path / "2.tar"), 2)]
  assert "1.tar: l has no caption" in str(raised.value) and "cut.tar is truncated" in str(raised.value)
  monkeypatch.setattr(tarfile, "open", lambda *a, **k: 1 / 0)
  assert len(open_source(tmp_path / "{0,2}.tar")) == 4
  with pytest.raises(UserError, match="only these have an index"):
    list(tars.index([str(tmp_path / ".index")], processes=1))


def test_more_shards_than_files_may_be_open_at_first(tmp_path):
  for i in range(40):
    write_tar(tmp_path / f"{i:02d}.tar", pair("k"))
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  with open(tmp_path / "00.tar") as file:  # no number below its own is free, or hardly one
    resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 20, limits[1]))
  try:
    assert len(open_source(tmp_path)) == 40
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_hidden_members_are_no_samples(tmp_path):
  hidden = [("._k.jpg", b"mac"), ("dir/._l.jpg", b"mac"), ("dir/._l.txt", b"mac"), (".jpg", b"mac")]
  source = open_source(write_tar(tmp_path / "a.tar", hidden + pair("k")))
  assert len(source) == 1 and source[0]["image"] == b"kkk"


def test_picture_and_caption_far_apart(tmp_path):
  between = [("x.json", bytes(200_000))]
  source = open_source(write_tar(tmp_path / "a.tar", [("k.jpg", b"I"), *between, ("k.txt", b"one")]))
  assert (source[0]["image"], source[0]["text"]) == (b"I", "one")


@pytest.fixture
def bucket():
  with buckets.bucket() as made:
    yield made


def test_a_bucket(tmp_path, monkeypatch, bucket):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  for name, members in (("00", pair("k" * 80_000)), ("01", pair("l") + pair("m"))):
    bucket.pipe_file(f"gs://b/shards/{name}.tar", write_tar(tmp_path / f"{name}.tar", members).read_bytes())
  for path in ("gs://b/shards", "gs://b/shards/*.tar", "gs://b/shards/{00..01}.tar"):
    source = open_source(path)
    assert len(source) == 3 and source.shards == ["gs://b/shards/00.tar", "gs://b/shards/01.tar"]
  bucket.ranges.clear()
  assert source[2] == {"image": b"mmm", "text": "a circle", "name": "gs://b/shards/01.tar: m"}
  ((path, start, end),) = bucket.ranges  # one request a sample, for its own bytes alone
  assert path == "gs://b/shards/01.tar" and end - start < 2048
  # An index left beside the shards serves machines that have not read them.
  index_shard("gs://b/shards/00.tar", beside=True)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
  monkeypatch.setattr(tarfile, "open", lambda *a, **k: 1 / 0)
  assert len(open_source("gs://b/shards/00.tar")) == 1
  with pytest.raises(UserError, match="gs://b/none"):
    open_source("gs://b/none")


@pytest.mark.parametrize("cut", [700, 1800, 2600])
def test_truncated_tar(tmp_path, cut):
  path = write_tar(tmp_path / "cut.tar", [("k.jpg", b"i" * 900), ("k.txt", b"c" * 600)])
  path.write_bytes(path.read_bytes()[:cut])
  with pytest.raises(UserError, match=r"cut\.tar is truncated"):
    open_source(path)


def test_structure_errors_name_shard_and_member(tmp_path):
  with pytest.raises(UserError, match=r"one\.tar: k2 has no caption"):
    open_source(write_tar(tmp_path / "one.tar", pair("k1") + [("k2.jpg", b"i")]))
  with pytest.raises(UserError, match=r"two\.tar: k2 has no image"):
    open_source(write_tar(tmp_path / "two.tar", pair("k1") + [("k2.txt", b"i")]))
  with pytest.raises(UserError, match=r"twice.*|k1.*twice"):
    open_source(write_tar(tmp_path / "three.tar", pair("k1") + pair("k1")))
  with pytest.raises(UserError, match="compressed"):
    open_source(write_tar(tmp_path / "four.tar", pair("k1"), "w:gz"))
  with pytest.raises(UserError, match="no samples"):
    open_source(write_tar(tmp_path / "five.tar", []))
  with pytest.raises(UserError, match="nothing at .*nowhere"):
    open_source(tmp_path / "nowhere")


def test_pictures_alone(tmp_path):
  path = write_tar(tmp_path / "a.tar", [("k.jpg", b"I" * 900), ("k.json", b"{}"), ("l.png", b"J")])
  with pytest.raises(UserError, match=r"a\.tar holds pictures without captions \(\.txt\); `blip3o data caption`"):
    open_source(path)
  source = open_source(path, captions=False)
  assert [source[i] for i in range(len(source))] == [
    {"image": b"I" * 900, "name": f"{path}: k"},
    {"image": b"J", "name": f"{path}: l"},
  ]
  with pytest.raises(UserError, match="k has no image"):  # captions alone are of no use to anybody
    open_source(write_tar(tmp_path / "b.tar", [("k.txt", b"a circle")]), captions=False)


def test_caption_that_is_not_utf8_fails_when_read(tmp_path):
  source = open_source(write_tar(tmp_path / "a.tar", pair("good") + pair("bad", b"\xff\xfe\xff")))
  assert source[0]["text"] == "a circle"
  with pytest.raises(UserError, match=r"a\.tar: bad\.txt is not UTF-8"):
    source[1]
