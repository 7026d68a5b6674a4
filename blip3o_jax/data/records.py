"""ArrayRecord files through the readers of Grain and TFDS, on storage that fails for a moment now and then."""

import contextlib
import copy
import errno
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import grain

from blip3o_jax.data import files

_FAILED = re.compile(r"\w+\(\) failed: ([^;]+)")  # how the readers tell what the system said, "pread() failed: ..."
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


class Records:
  """Random access to the records of such a source; trouble that may pass is waited for, see files.patiently.

  A reader that met it while it opened its file repeats it for ever, so a copy of the source takes its place: a copy
  opens its files anew.

  Args:
    source: of grain.sources or tensorflow_datasets; its files stay open, see files.keep_open.
  """

  def __init__(self, source: Any):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> bytes:
    """Raises OSError for what the system refuses, RuntimeError for what is damaged."""
    return files.patiently("", lambda: self._read(index))

  def _read(self, index: int) -> bytes:
    source = self._source
    try:
      with _system_errors():
        return source[index]
    except OSError:
      self._source = copy.copy(source)
      raise


def open_records(paths: str | Sequence[str]) -> Records:
  """The records of files, whose paths may end with "[0:SIZE]": then none is opened before it is needed. Raises OSError
  for what the system refuses, RuntimeError for what is no ArrayRecord."""

  def opened():
    with _system_errors():
      return Records(grain.sources.ArrayRecordDataSource(paths))

  return files.patiently("", opened)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
  try:
    yield
  except RuntimeError as error:
    if not (failed := _FAILED.match(str(error))):
      raise
    raise OSError(_NUMBERS.get(failed[1], errno.EIO), str(error)) from None
