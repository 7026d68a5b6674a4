import errno
import os
import resource
import time

import buckets
import pytest

from blip3o_jax.data import files
from blip3o_jax.errors import UserError


class HttpError(Exception):
  """As gcsfs has it: a plain Exception."""


@pytest.fixture
def waited(monkeypatch):
  """Seconds waited for, without waiting."""
  found = []
  monkeypatch.setattr(time, "sleep", found.append)
  return found


def failing(times, error, call):
  """`call`, which raises so many times before."""
  left = [error] * times

  def wrapped(*args, **kwargs):
    if left:
      raise left.pop()
    return call(*args, **kwargs)

  return wrapped


def test_a_disk_that_fails_for_a_while_is_waited_for(tmp_path, monkeypatch, waited):
  (tmp_path / "a").write_bytes(b"12345")
  path, stale = str(tmp_path / "a"), OSError(errno.ESTALE, "Stale file handle")
  monkeypatch.setattr(os, "pread", failing(4, stale, os.pread))
  assert files.read(path, 1, 3) == b"234" and len(waited) == 4 and waited == sorted(waited)
  monkeypatch.setattr(os, "pread", failing(5, stale, os.pread))
  with pytest.raises(UserError, match="a cannot be read: .*Stale file handle"):
    files.read(path)


def test_what_is_not_there_is_not_waited_for(tmp_path, waited):
  (tmp_path / "a").write_bytes(b"12345")
  for path, why in (
    ("none", "No such file"),
    ("", "Is a directory"),
    ("a/b", "Not a directory"),
    ("x" * 300, "too long"),
  ):
    with pytest.raises(UserError, match=why):
      files.read(str(tmp_path / path))
  with pytest.raises(UserError, match="null byte"):
    files.read("\0")
  with pytest.raises(UserError, match="a ends before byte 6"):
    files.read(str(tmp_path / "a"), 1, 5)
  assert not waited


def test_a_scan_that_fails_for_a_while_begins_again(tmp_path, waited):
  (tmp_path / "a").write_bytes(b"12345")
  use = failing(2, OSError(errno.EIO, "Input/output error"), lambda stream: stream.read())
  assert files.scan(str(tmp_path / "a"), use) == b"12345" and len(waited) == 2
  with pytest.raises(UserError, match="none cannot be read"):
    files.scan(str(tmp_path / "none"), use)


def test_room_for_files_that_stay_open():
  limits = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 10, hard))
    files.keep_open(10)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    files.keep_open(0)
    with pytest.raises(UserError, match=r"of data have to stay open, this system allows a process \d+ in all; raise"):
      files.keep_open(1 << 40)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_whatever_a_bucket_raises_is_waited_for_and_told_in_one_line(monkeypatch, waited):
  with buckets.bucket() as bucket:
    bucket.pipe_file("gs://b/a", b"12345")
    monkeypatch.setattr(buckets.Bucket, "cat_file", failing(2, HttpError("503"), buckets.Bucket.cat_file))
    assert files.read("gs://b/a", 1, 3) == b"234" and len(waited) == 2
    monkeypatch.setattr(buckets.Bucket, "cat_file", failing(9, HttpError("Invalid\nCredentials, 401"), None))
    with pytest.raises(UserError, match="gs://b/a cannot be read: Invalid Credentials, 401"):
      files.read("gs://b/a")
  with pytest.raises(UserError, match="gs://b/a cannot be read: TimeoutError"), files.reading("gs://b/a"):
    raise TimeoutError
  with pytest.raises(HttpError), files.reading("a"):  # on a disk it would be a mistake of ours
    raise HttpError
