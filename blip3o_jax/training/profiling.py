"""An xprof trace of a few steps."""

import os
import tempfile

import jax
from etils import epath

from blip3o_jax.data.files import is_remote


class Profile:
  """Traces `steps` steps from step `first` on into `directory` (TensorBoard's profile plugin and xprof read it).

  The first two steps of a start are left out by the caller: they compile. With 0 steps nothing is done. Use as a
  context manager: a run that ends inside the trace leaves what there is.
  """

  def __init__(self, directory: epath.Path, first: int, steps: int):
    self._directory, self._first, self._steps = directory, first, steps
    self._running = False
    # Traces are written to a disk; for a bucket they are copied there.
    self._local = epath.Path(tempfile.mkdtemp() if steps and is_remote(directory) else directory)

  def before(self, step: int) -> None:
    """Call before step `step` is dispatched."""
    if self._steps and step == self._first:
      jax.profiler.start_trace(os.fspath(self._local))
      self._running = True

  def after(self, step: int, result: object) -> None:
    """Call after it; waits for `result` at the end of the trace, so that the devices' part is in it."""
    if self._running and step >= self._first + self._steps - 1:
      jax.block_until_ready(result)
      self._stop()

  def _stop(self) -> None:
    self._running = False
    jax.profiler.stop_trace()
    if self._local != self._directory:
      for file in [x for x in self._local.rglob("*") if x.is_file()]:
        target = self._directory / file.relative_to(self._local)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.copy(target)
    print(f"profile: {self._directory}", flush=True)

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *error) -> None:
    if self._running:
      self._stop()
