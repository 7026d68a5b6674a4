"""A bucket in memory: fsspec's own file system of that kind, reached through `gs://` as a real bucket would be.

No bucket of Google was at hand; what this cannot show is gcsfs itself, its credentials and its retries.
"""

import contextlib
import sys

import fsspec.implementations.memory
import pytest
from etils.epath import backend


class Bucket(fsspec.implementations.memory.MemoryFileSystem):
  """Also records which ranges were asked for."""

  protocol = ("gs", "gcs")
  cachable = False
  store, pseudo_dirs, ranges = {}, [""], []

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol("memory://" + str(path).removeprefix("gs://").removeprefix("gcs://"))

  def cat_file(self, path, start=None, end=None, **kwargs):
    self.ranges.append((path, start, end))
    return super().cat_file(path, start, end, **kwargs)

  def info(self, path, **kwargs):
    info = super().info(path, **kwargs)
    return info | {"mtime": info["created"]} if "created" in info else info


@contextlib.contextmanager
def bucket():
  """An empty bucket behind gs://, in this process."""
  with pytest.MonkeyPatch.context() as patch:
    for scheme in Bucket.protocol:
      patch.setitem(sys.modules["fsspec.registry"]._registry, scheme, Bucket)
    for name, empty in (("store", {}), ("pseudo_dirs", [""]), ("ranges", [])):
      patch.setattr(Bucket, name, empty)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield Bucket()
    backend.fsspec_backend._get_filesystem.cache_clear()
