"""What all jobs share: the inputs are cut into parts, every process takes its own, and a part that is finished says so.

  OUT/job.json          what the job is: another job may not go on with it
  OUT/parts/000012.jsonl   the records of a finished part, there whole or not at all
  OUT/manifest.jsonl    the records of all parts, once all are finished

Which parts there are depends on the inputs alone, so a job may go on with any number of processes or devices. Processes
work without a word from each other, and wait at the end until all have done their parts. One that dies ends the others
too, within minutes (JAX sees to that); the next start takes up what they left.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from blip3o_jax.data.inputs import read_json
from blip3o_jax.data.outputs import differences, remove_stale, write_atomically
from blip3o_jax.errors import UserError
from blip3o_jax.sharding import distributed


class Parts:
  """The parts of one job.

  Attributes:
    out: its folder; count: of parts; size: inputs of a part.
  """

  def __init__(self, out: str | Path, inputs: int, facts: Mapping[str, Any], *, largest: int = 256):
    """`facts`: JSON that says what is made of what; `largest`: inputs of a part at most.

    Raises:
      UserError: `out` holds another job.
    """
    self.out = Path(out)
    # Some 256 parts at least, so that as many processes have work, but of few inputs, so that little is done again.
    self.size = min(max(1, inputs // 256), largest)
    self.count, self.inputs = -(-inputs // self.size), inputs
    facts, stored = {**facts, "inputs": inputs}, self.out / "job.json"
    if stored.exists():
      (there,), _ = read_json([stored])
      if not isinstance(there, dict):
        raise UserError(f"{stored} is not of a job; give another folder")
      if changed := differences(_flat(there), _flat(facts)).values():
        raise UserError(f"{self.out} holds another job: its {'; '.join(changed)}; give another folder")
    write_atomically(stored, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())

  def unfinished(self) -> list[range]:
    """The inputs of each part of this process that is not finished; half-written records of such a part are removed."""
    mine = range(jax.process_index(), self.count, jax.process_count())
    left = [part for part in mine if not self._file(part).exists()]
    remove_stale(map(self._file, left))
    return [range(part * self.size, min((part + 1) * self.size, self.inputs)) for part in left]

  def finish(self, inputs: range, records: Sequence[Mapping[str, Any]]) -> None:
    """Say that a part is done, after everything that its records name has been written."""
    write_atomically(self._file(inputs.start // self.size), map(_line, records))

  def merge(self) -> list[dict] | None:
    """OUT/manifest.jsonl, if every part of every process is finished; returns the records that tell an error."""
    files = [self._file(part) for part in range(self.count)]
    if not all(file.exists() for file in files):
      return None
    errors = []

    def lines():
      for file in files:
        for line in file.read_bytes().splitlines(keepends=True):
          if b'"error"' in line and "error" in (record := json.loads(line)):
            errors.append(record)
          yield line

    write_atomically(self.out / "manifest.jsonl", lines())
    return errors

  def _file(self, part: int) -> Path:
    return self.out / "parts" / f"{part:06d}.jsonl"


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
  """Settings within facts in the place of all of them, so that one that differs is named."""
  settings = facts.get("settings")
  return {**facts, "settings": None, **settings} if isinstance(settings, Mapping) else dict(facts)


def _line(record: Mapping[str, Any]) -> bytes:
  return (json.dumps(record, ensure_ascii=False) + "\n").encode()


class Progress:
  """A line every few seconds: how far, how fast, how long still."""

  def __init__(self, total: int, what: str, every: float = 10.0):
    self.total, self.what, self.every = total, what, every
    self.done, self.start = 0, time.monotonic()
    self._told = self.start

  def add(self, n: int = 1) -> None:
    """`n` more are done."""
    self.done += n
    if time.monotonic() - self._told >= self.every or self.done == self.total:
      self._told = time.monotonic()
      print(self.line(), file=sys.stderr, flush=True)

  def line(self) -> str:
    """As it is printed; with several processes, the share of this one."""
    seconds = max(time.monotonic() - self.start, 1e-9)
    rate = self.done / seconds
    left = f", {_duration((self.total - self.done) / rate)} left" if 0 < self.done < self.total else ""
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    return f"{who}{self.done} of {self.total} {self.what}, {rate:.3g} a second{left}"


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def closing(parts: Parts, what: str) -> str:
  """Wait for the other processes, merge, and sum up in a line. Raises UserError if some inputs could not be used: the
  others are done."""
  distributed.wait_for_all()
  errors = parts.merge()
  if errors is None:  # hosts whose disk is not the same, or not yet up to date
    return f"this process is done; {parts.out} does not show all parts of the others, the same command merges them"
  if errors:
    raise UserError(
      f"{len(errors)} of {parts.inputs} {what} could not be used, the others are done; "
      f"grep '\"error\"' {parts.out / 'manifest.jsonl'} lists them; once they are mended, `grep -rl '\"error\"' "
      f"{parts.out / 'parts'} | xargs rm` and the same command try them again"
    )
  return f"{parts.out / 'manifest.jsonl'}"
