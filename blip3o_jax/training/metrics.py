"""WORKDIR/metrics.jsonl, the progress line, and TensorBoard on request."""

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from blip3o_jax.data.files import is_remote
from blip3o_jax.data.outputs import write_atomically
from blip3o_jax.errors import UserError
from blip3o_jax.training.throughput import Timing, utilisation


class MetricLog:
  """Reports a step when the next one has been handed in, so that the device never waits for the host.

  One JSON line for step 1, every `every` steps and the last, after n updates:
    step, loss, the objective's own metrics, learning_rate, grad_norm (before clipping), update_norm,
    skipped (updates left out so far, see training.step);
  and since the line before:
    step_seconds (a step, waiting for data included; compiling, saving and drawing are not), images_per_s (examples, to
    be exact), images_per_s_per_chip, mfu (training.throughput.utilisation, where it is known),
    data_wait (share of step_seconds), save_seconds (that steps waited for saving); goodput since the first start.

  Lines after `start` are of a run that was cut off and goes on from there: they are dropped. Other processes than the
  first write nothing. A disk that takes no line is told; the lines wait for it. A bucket cannot be appended to: there
  the file is put at every save.
  """

  def __init__(
    self,
    workdir: epath.Path,
    timing: Timing,
    devices: Sequence[jax.Device],
    *,
    start: int,
    steps: int,
    every: int,
    batch_size: int,
    max_bad: int,
    tensorboard: bool = False,
  ):
    self.path = workdir / "metrics.jsonl"
    self.bad = 0  # steps without a finite loss or gradient, in a row up to the last one reported
    self._timing, self._devices = timing, devices
    self._steps, self._every, self._batch, self._max_bad = steps, every, batch_size, max_bad
    self._pending: tuple[int, Any, float | None, Mapping[str, int]] | None = None
    self._last_step, self._flops = start, 0.0
    self._writes = jax.process_index() == 0
    self._board = _tensorboard(workdir) if tensorboard and self._writes else None
    kept = [line for line in read(self.path) if line["step"] <= start]
    self.last = kept[-1] if kept else {}
    if self._writes:
      content = "".join(json.dumps(line) + "\n" for line in kept).encode()
      write_atomically(self.path, content)
      self._file, self._waiting = self._open(content), b""

  def _open(self, content: bytes) -> io.RawIOBase:
    if not is_remote(self.path):
      return open(self.path, "ab", buffering=0)
    file = tempfile.TemporaryFile(buffering=0)
    file.write(content)
    return file

  def put(self) -> None:
    """Report what is pending; every line is then where it belongs."""
    self.flush()
    if self._writes and is_remote(self.path):
      self._file.seek(0)
      try:
        write_atomically(self.path, self._file.read())
      except Exception as error:  # buckets fail in more ways than have names; the lines are kept here
        print(f"WARNING: {self.path} cannot be written ({error}); the next save tries again", flush=True)

  def add(
    self,
    step: int,
    scalars: Mapping[str, jax.Array],
    flops: float | None = None,
    counts: Mapping[str, int] | None = None,
  ) -> None:
    """Hand in the scalars of the step just dispatched, its operations if known, and what was counted of its data;
    reports the one before.

    Raises:
      UserError: too many steps in a row without a finite loss.
    """
    self.flush()
    self._pending = (step, scalars, flops, counts or {})

  def flush(self) -> None:
    """Report what is pending (waits for the device)."""
    if self._pending is None:
      return
    step, scalars, flops, counts = self._pending
    self._pending = None
    values = {key: value.item() for key, value in jax.device_get(dict(scalars)).items()}
    self._flops += flops or 0.0
    self.bad = values.pop("skipped_in_row")
    if self.bad >= self._max_bad:
      raise UserError(
        f"loss or gradient was not finite for {self.bad} steps in a row, steps {step - self.bad + 1} to {step}; the "
        "last good checkpoint is kept: look at the data of these steps, or go on from it with a lower "
        "optimizer.learning_rate or clip_norm"
      )
    if step != 1 and step % self._every and step != self._steps:
      return
    speed = self._speed(step)
    self.last = {"step": step, "loss": values["loss"], **values, **speed, **counts}
    if not self._writes:
      return
    self._write(json.dumps(self.last) + "\n")
    print(self._line(step, values | {k: n for k, n in counts.items() if n}, speed), flush=True)
    if self._board is not None:
      self._board.write_scalars(step, self.last)

  def _speed(self, step: int) -> dict[str, float]:
    """Figures of the steps since the line before."""
    seconds, lost = self._timing.lap()
    steps, flops = step - self._last_step, self._flops
    self._last_step, self._flops = step, 0.0
    seconds = max(seconds - sum(lost.values()) + lost.get("data", 0.0), 1e-9)
    rate = steps * self._batch / seconds
    speed = {"step_seconds": seconds / steps, "images_per_s": rate, "images_per_s_per_chip": rate / len(self._devices)}
    if (mfu := utilisation(flops, seconds, self._devices)) is not None:
      speed["mfu"] = mfu
    speed |= {"data_wait": lost.get("data", 0.0) / seconds, "save_seconds": lost.get("save", 0.0)}
    return {name: float(f"{x:.5g}") for name, x in (speed | {"goodput": self._timing.goodput()}).items()}

  def _line(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> str:
    words = [f"step {step}/{self._steps}", f"loss {values['loss']:.5f}", f"{speed['images_per_s']:.1f} images/s"]
    words += [f"{speed['step_seconds']:.3g} s/step", f"ETA {_clock((self._steps - step) * speed['step_seconds'])}"]
    words += [f"mfu {speed['mfu']:.1%}"] if "mfu" in speed else []
    words += [f"data wait {speed['data_wait']:.0%}", f"goodput {speed['goodput']:.0%}"]
    words += [f"saving {speed['save_seconds']:.1f} s"] if speed["save_seconds"] >= 0.05 else []
    shown = {k: v for k, v in values.items() if k != "loss" and (k != "skipped" or v)}
    return "  ".join([*words, " ".join(f"{k} {v:.4g}" for k, v in shown.items())])

  def _write(self, line: str) -> None:
    told = bool(self._waiting)
    self._waiting += line.encode()
    try:
      while self._waiting:  # a disk that is nearly full takes a part
        self._waiting = self._waiting[self._file.write(self._waiting) :]
    except OSError as error:
      if not told:
        print(f"WARNING: {self.path} cannot be written ({error.strerror}); training goes on, lines wait", flush=True)

  def close(self) -> None:
    """Close the files; what is pending is not reported."""
    if self._writes:
      self._file.close()
    if self._board is not None:
      self._board.close()


def read(path: epath.Path) -> list[dict[str, Any]]:
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


def _tensorboard(workdir: epath.Path):
  try:
    from clu import metric_writers
  except ImportError as error:
    raise UserError(f"tensorboard=True needs the extra: pip install 'blip3o_jax[tensorboard]' ({error})") from error
  return metric_writers.SummaryWriter(str(workdir / "tensorboard"))
