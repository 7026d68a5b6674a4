"""Files that data lie in, on a disk or in a bucket: what a path means, and reading a piece of one.

A path with a scheme (`gs://`, `s3://`) is listed through etils.epath and read in ranges through fsspec: a file handle
of either reads some megabytes ahead, which random access would pay for and throw away. Google's buckets need `gcsfs`.
"""

import errno
import glob
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import fsspec
from etils import epath

from blip3o_jax.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WAITS = (0.1, 0.5, 2.0, 8.0)  # seconds before a read that failed is tried again
_LASTING = (UserError, ImportError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_OTHERS = 256  # files that a process has open beside its data
T = TypeVar("T")


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path names something in a bucket."""
  return "://" in os.fspath(path)


def expand(path) -> list[str]:
  """Every file or folder that a path or a list of paths means, in sorted order, none twice.

  Args:
    path: may hold `*`, `?`, `[...]`, and braces: `{a,b}`, and `{000..123}` with as many digits as written.

  Raises:
    UserError: a part of it that is not there.
  """
  found: set[str] = set()
  for one in [path] if isinstance(path, str | os.PathLike) else path:
    for plain in _braces(os.fspath(one)):
      matches = _glob(plain)
      if not matches:
        raise UserError(f"nothing at {plain}; give a file, a folder, or a pattern such as shards/{{000..099}}.tar")
      found.update(matches)
  return sorted(found)


def _braces(path: str) -> Iterator[str]:
  match = _BRACES.search(path)
  if not match:
    yield path
    return
  before, inner, after = path[: match.start()], match[1], path[match.end() :]
  span = _RANGE.fullmatch(inner)
  if span:
    first, last = (int(end) for end in span.groups())
    if first > last:
      raise UserError(f"{path}: {match[0]} counts down; write the smaller number first")
    choices = [f"{i:0{len(span[1])}d}" for i in range(first, last + 1)]
  else:
    choices = inner.split(",")
  for choice in choices:
    yield from _braces(before + choice + after)


def _glob(path: str) -> list[str]:
  if not is_remote(path):
    return glob.glob(path) if glob.has_magic(path) else [path] * os.path.exists(path)
  with reading(path):
    if glob.has_magic(path):
      folder, _, pattern = path.rpartition("/")
      return patiently(path, lambda: [os.fspath(match) for match in epath.Path(folder).glob(pattern)])
    return [path] * patiently(path, lambda: epath.Path(path).exists())


def listing(folder: str) -> list[str]:
  """Names of what lies in a folder, sorted; hidden ones left out."""
  with reading(folder):
    names = patiently(folder, lambda: [child.name for child in epath.Path(folder).iterdir()])
  return sorted(name for name in names if not name.startswith("."))


def is_folder(path: str) -> bool:
  """Whether there is a folder at a path."""
  with reading(path):
    return patiently(path, lambda: epath.Path(path).is_dir())


def scan(path: str, use: Callable[[BinaryIO], T]) -> T:
  """What `use` makes of a file that is open for reading from its start to its end, in bytes."""

  def once():
    with _bucket(path).open(path, cache_type="readahead") if is_remote(path) else open(path, "rb") as stream:
      return use(stream)

  with reading(path):
    return patiently(path, once)


def stamp(path: str) -> tuple[int, int]:
  """(bytes, time of the last change): a file that has the same two is taken for the same file."""
  with reading(path):
    if is_remote(path):
      stat = patiently(path, lambda: epath.Path(path).stat())
      return stat.length, stat.mtime
    stat = patiently(path, lambda: os.stat(path))
    return stat.st_size, stat.st_mtime_ns


def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
  """`size` bytes from `offset` (all that follow). Opens and closes: thousands of shards must not mean as many handles.

  Raises:
    UserError: the file is not there, cannot be read, or is shorter than that.
  """
  with reading(path):
    return patiently(path, lambda: _read(path, offset, size))


def patiently(path: str, call: Callable[[], T]) -> T:
  """What `call` reads of a path. Trouble that may pass is waited for, some ten seconds, and `call` is called again:
  taken for a bad sample it would change the order of the data. What stays is raised as it is, see `reading`."""
  for wait in _WAITS:
    try:
      return call()
    except Exception as error:
      if not _may_pass(error, path):
        raise
    time.sleep(wait)
  return call()


def _read(path: str, offset: int, size: int | None) -> bytes:
  if is_remote(path):
    end = None if size is None else offset + size
    content = _bucket(path).cat_file(path, offset, end)
  else:
    handle = os.open(path, os.O_RDONLY)
    try:
      size = os.fstat(handle).st_size - offset if size is None else size
      content = os.pread(handle, size, offset)
    finally:
      os.close(handle)
  if size is not None and len(content) < size:
    raise UserError(f"{path} ends before byte {offset + size}; it has been cut, or written anew since it was opened")
  return content


def _bucket(path: str) -> fsspec.AbstractFileSystem:
  return fsspec.filesystem(path.partition("://")[0])


def _may_pass(error: Exception, path: str) -> bool:
  """Whether a network or its file system may only have had a bad moment."""
  lasting = isinstance(error, _LASTING) or getattr(error, "errno", None) == errno.ENAMETOOLONG
  return not lasting and (isinstance(error, OSError) or is_remote(path))


def keep_open(count: int) -> None:
  """Make room for so many more files that stay open: many systems start a process with 1024, and let it ask for more.

  Raises:
    UserError: the system does not grant so many.
  """
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  soft, hard = (1 << 30 if limit == resource.RLIM_INFINITY else limit for limit in limits)
  if count + _OTHERS > hard:
    raise UserError(
      f"{count} files of data have to stay open, this system allows a process {hard} in all; raise its limit "
      "(ulimit -Hn), or make fewer and larger files"
    )
  resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + count, hard), limits[1]))


class reading:
  """Context in which what a file system or a bucket raises becomes a UserError naming the path."""

  def __init__(self, path: str):
    self._path = path

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if not isinstance(error, Exception) or isinstance(error, UserError):
      return
    if isinstance(error, ImportError):
      extra = "gcsfs" if self._path.startswith("gs://") else "the fsspec package of this scheme"
      raise UserError(f"{self._path}: reading it needs {extra}; pip install it ({error})") from error
    # What clients of buckets raise has no parent in common.
    if isinstance(error, OSError | ValueError | RuntimeError) or is_remote(self._path):
      why = " ".join(str(error).split())[:200] or kind.__name__
      raise UserError(f"{self._path} cannot be read: {why}") from error
