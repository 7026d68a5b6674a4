"""Errors that a user can mend (floor 0)."""

import contextlib
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class UserError(Exception):
  """Bad input: one line that says what is wrong, where, and what to do.

  The command line prints it on stderr and exits with status 2, without a traceback.
  """


class Problems(UserError):
  """What is wrong with one input: one line, or if it is several things a line that counts them and a line each (the
  first 40)."""

  _SHOWN = 40

  def __init__(self, head: str, problems: Sequence[str]):
    self.problems = [" ".join(problem.split()) for problem in problems]
    if len(self.problems) == 1:
      super().__init__(f"{head}: {self.problems[0]}")
      return
    lines = [f"  {problem}" for problem in self.problems[: self._SHOWN]]
    more = [f"  ... and {len(problems) - self._SHOWN} more"] if len(problems) > self._SHOWN else []
    super().__init__("\n".join([f"{head}, {len(problems)} problems:", *lines, *more]))


class CheckFailed(Exception):
  """A check that was asked for did not hold (`verify` missed a bar): exit status 1."""


class Preempted(BaseException):
  """Asked to stop; everything is saved and the same command continues: exit status 75.

  Raised in a signal handler, anywhere at all: no `except Exception`, which is about something else, may catch it.
  """


def told(error: Exception) -> str:
  """A library's error as part of one line."""
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def user_code(path: str | os.PathLike) -> Iterator[None]:
  """Context in which whatever the user's file `path` raises becomes a UserError that names the line."""
  try:
    yield
  except UserError:
    raise
  except SyntaxError as error:
    raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from error
  except Exception as error:
    line = traceback.extract_tb(error.__traceback__)[-1]
    raise UserError(f"{path} failed at {line.filename}:{line.lineno}: {type(error).__name__}: {error}") from error


def require_plain(where: str, config: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
  """Raise UserError where a reference's config `where` sets an entry to another value than the only one known here."""
  for key, value in plain.items():
    if config.get(key, value) != value:
      raise UserError(f"{where}: {key}={config[key]!r} is not supported; expected {value!r}")


def out_of_memory(error: Exception) -> str | None:
  """What to say of an error of XLA if it is that a device has no memory left, in one line."""
  if "RESOURCE_EXHAUSTED" not in str(error):
    return None
  return (
    "the device has no memory left: cut the weights over more devices (--fsdp, of a run --config.mesh.fsdp), take "
    f"fewer at once (--batch-size, --config.batch_size) or smaller pictures ({str(error).splitlines()[0]:.200})"
  )
