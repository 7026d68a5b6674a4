"""WORKDIR/metrics.jsonl, the progress line, and TensorBoard on request."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from blip3o_jax.errors import UserError


class MetricLog:
  """Reports a step when the next one has been handed in, so that the device never waits for the host.

  One JSON line for step 1, every `every` steps and the last: {"step": n, "loss": ..., ...} after n updates. Lines after
  `start` are of a run that was cut off and goes on from there: they are dropped. Other processes than the first write
  nothing.
  """

  def __init__(
    self, workdir: Path, *, start: int, steps: int, every: int, batch_size: int, max_bad: int, tensorboard: bool = False
  ):
    self.path = workdir / "metrics.jsonl"
    self._steps, self._every, self._batch, self._max_bad = steps, every, batch_size, max_bad
    self._pending: tuple[int, Any] | None = None
    self._mark = (time.perf_counter(), start)
    self._writes = jax.process_index() == 0
    self._board = _tensorboard(workdir) if tensorboard and self._writes else None
    kept = [line for line in read(self.path) if line["step"] <= start]
    self.last = kept[-1] if kept else {}
    if self._writes:
      temporary = self.path.with_name(f".metrics.jsonl.{os.getpid()}")
      temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
      temporary.replace(self.path)
      self._file = self.path.open("a")

  def add(self, step: int, scalars: Mapping[str, jax.Array]) -> None:
    """Hand in the scalars of the step just dispatched; reports the one before.

    Raises:
      UserError: too many steps in a row without a finite loss.
    """
    self.flush()
    self._pending = (step, scalars)

  def flush(self) -> None:
    """Report what is pending (waits for the device)."""
    if self._pending is None:
      return
    step, scalars = self._pending
    self._pending = None
    values = {key: value.item() for key, value in jax.device_get(dict(scalars)).items()}
    if (bad := values.pop("skipped_in_row")) >= self._max_bad:
      raise UserError(
        f"loss or gradient was not finite for {bad} steps in a row (step {step}); lower optimizer.learning_rate or look"
        " at the data"
      )
    if step != 1 and step % self._every and step != self._steps:
      return
    now = time.perf_counter()
    seconds, steps = now - self._mark[0], step - self._mark[1]
    self._mark = (now, step)
    rate = steps * self._batch / seconds
    self.last = {"step": step, "loss": values["loss"], **values, "examples_per_s": round(rate, 2)}
    if not self._writes:
      return
    self._file.write(json.dumps(self.last) + "\n")
    self._file.flush()
    eta = (self._steps - step) * seconds / max(steps, 1)
    extra = " ".join(
      f"{k} {v:.4g}" for k, v in values.items() if k not in ("loss", "skipped") or (k == "skipped" and v)
    )
    print(
      f"step {step}/{self._steps}  loss {values['loss']:.5f}  {rate:.1f} examples/s  ETA {_clock(eta)}  {extra}",
      flush=True,
    )
    if self._board is not None:
      self._board.write_scalars(step, self.last)

  def close(self) -> None:
    """Close the files; what is pending is not reported."""
    if self._writes:
      self._file.close()
    if self._board is not None:
      self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
  """The lines of a metrics file; a last line that was cut off by a kill is left out."""
  lines = []
  for text in path.read_text().splitlines() if path.exists() else []:
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      break
  return lines


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"


def _tensorboard(workdir: Path):
  try:
    from clu import metric_writers
  except ImportError as error:
    raise UserError(f"tensorboard=True needs the extra: pip install 'blip3o_jax[tensorboard]' ({error})") from error
  return metric_writers.SummaryWriter(str(workdir / "tensorboard"))
