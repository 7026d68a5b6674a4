"""Cached features on disk; what makes them is tested with jobs.cache_features."""

import numpy as np
import pytest

from blip3o_jax.data import features, pipeline
from blip3o_jax.data.sources import SourceConfig, open_source
from blip3o_jax.errors import UserError


@pytest.fixture
def cached(tmp_path):
  """Features of twenty pictures, all values of one its number, in shards of eight."""
  return write(tmp_path / "cached")


def write(folder):
  folder.mkdir()
  manifest = features.Manifest({}, (4, 16), "float32", ["pictures"], samples=20, shard_size=8)
  manifest.write(folder)
  for name, rows in manifest.shards:
    records = [features.pack(np.full((4, 16), i, np.float32), f"picture {i}") for i in rows]
    if name.startswith("features-00002"):
      records[-1] = features.pack_error("no picture")
    features.write_shard(folder / name, records)
  return folder


def test_what_was_written_is_read(cached):
  source = open_source(cached)
  assert len(source) == 20 and [source[i]["text"] for i in (0, 17)] == ["picture 0", "picture 17"]
  assert source[9]["features"].shape == (4, 16) and (source[9]["features"] == 9).all()
  with pytest.raises(UserError, match="features-00002-of-00003.array_record: sample 19: no picture"):
    source[19]


@pytest.mark.parametrize(
  "damage", [lambda c: bytes(len(c)), lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c[::-1]]
)
def test_samples_of_a_damaged_shard_are_bad(cached, damage):
  shard = cached / "features-00001-of-00003.array_record"
  shard.write_bytes(damage(shard.read_bytes()))
  source = open_source(cached)
  for i in (8, 15):
    with pytest.raises(UserError, match=f"features-00001-of-00003.array_record: sample {i}: .*remove it and run"):
      source[i]
  assert (source[7]["features"] == 7).all() and (source[16]["features"] == 16).all()


def test_a_record_that_holds_something_else_is_bad(cached):
  shard = cached / "features-00000-of-00003.array_record"
  shard.unlink()
  other = [features.pack(np.zeros((4, 15), np.float32), ""), b"\x03", b"\xc1", b"\x80"]
  features.write_shard(shard, other + [b""] * 4)
  source = open_source(cached)
  for i in range(5):
    with pytest.raises(UserError, match=f"sample {i}: .*if the shard is damaged"):
      source[i]


def test_a_list_of_one_folder_is_that_folder_and_of_several_is_refused(cached, tmp_path):
  assert len(open_source(SourceConfig((str(cached),)))) == 20
  write(tmp_path / "cached2")
  for paths in ((str(cached), str(tmp_path / "cached2")), str(tmp_path / "cached*")):
    with pytest.raises(
      UserError, match="cached cannot be read as one with others; name each of them under data.source"
    ):
      pipeline.open_mixture(pipeline.DataConfig("features", paths))
