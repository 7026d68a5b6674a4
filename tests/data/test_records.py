import errno
import resource
import time

import numpy as np
import pytest

from blip3o_jax.data import features
from blip3o_jax.data.records import Records, open_records
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import UserError


class Reader:
  """As ArrayRecord's: what befell it when it opened its file it tells for ever; a copy opens the file anew."""

  def __init__(self, *errors):
    self.errors = list(errors)

  def __copy__(self):
    return Reader(*self.errors[1:])

  def __getitem__(self, index):
    if self.errors and self.errors[0]:
      raise RuntimeError(self.errors[0])
    return index


@pytest.fixture
def waited(monkeypatch):
  """Seconds waited for, without waiting."""
  found = []
  monkeypatch.setattr(time, "sleep", found.append)
  return found


def test_a_reader_that_fails_for_a_while_is_replaced(waited):
  why = "pread() failed: Stale file handle; reading a.array_record; at byte 7"
  records = Records(Reader(why, why))
  assert records[5] == 5 and len(waited) == 2
  with pytest.raises(OSError, match="pread.. failed: Stale file handle") as error:
    Records(Reader(*[why] * 9))[5]
  assert error.value.errno == errno.ESTALE


def test_what_will_not_pass_is_not_waited_for(waited):
  with pytest.raises(RuntimeError, match="hash mismatch"):
    Records(Reader("Corrupted Riegeli/records file: chunk data hash mismatch"))[0]
  records = Records(Reader("open() failed: No such file or directory; opening a.array_record"))
  with pytest.raises(FileNotFoundError):
    records[0]
  assert not waited and records[0] == 0  # it came back meanwhile


def test_features_that_cannot_be_opened_for_a_moment(tmp_path, monkeypatch):
  """With the true reader: no more files may be open until somebody has waited; then a shard is away for a while."""
  manifest = features.Manifest({}, (4, 16), "float32", ["pictures"], samples=4, shard_size=2)
  manifest.write(tmp_path)
  for name, rows in manifest.shards:
    features.write_shard(tmp_path / name, [features.pack(np.full((4, 16), i, np.float32), "a") for i in rows])
  source, limits = open_source(tmp_path), resource.getrlimit(resource.RLIMIT_NOFILE)
  monkeypatch.setattr(time, "sleep", lambda seconds: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    assert (source[1]["features"] == 1).all()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    assert len(open_records(str(tmp_path / manifest.shards[0][0]))) == 2
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
  shard = tmp_path / manifest.shards[1][0]
  shard.rename(tmp_path / "away")
  with pytest.raises(UserError, match="sample 3: .*No such file"):
    source[3]
  (tmp_path / "away").rename(shard)
  assert (source[3]["features"] == 3).all()
