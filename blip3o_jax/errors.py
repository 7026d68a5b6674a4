"""Errors that a user can mend (floor 0)."""


class UserError(Exception):
  """Bad input: one line that says what is wrong, where, and what to do.

  The command line prints it on stderr and exits with status 2, without a traceback.
  """


class CheckFailed(Exception):
  """A check that was asked for did not hold (`verify` missed a bar): exit status 1."""


class Preempted(Exception):
  """Asked to stop; everything is saved and the same command continues: exit status 75."""
