"""Errors that a user can mend (floor 0)."""

from collections.abc import Sequence


class UserError(Exception):
  """Bad input: one line that says what is wrong, where, and what to do.

  The command line prints it on stderr and exits with status 2, without a traceback.
  """


class Problems(UserError):
  """Several things wrong with one input: a line that counts them, then a line each (the first 40)."""

  _SHOWN = 40

  def __init__(self, head: str, problems: Sequence[str]):
    lines = [f"  {' '.join(problem.split())}" for problem in problems[: self._SHOWN]]
    more = [f"  ... and {len(problems) - self._SHOWN} more"] if len(problems) > self._SHOWN else []
    super().__init__("\n".join([f"{len(problems)} {head}:", *lines, *more]))


class CheckFailed(Exception):
  """A check that was asked for did not hold (`verify` missed a bar): exit status 1."""


class Preempted(Exception):
  """Asked to stop; everything is saved and the same command continues: exit status 75."""
