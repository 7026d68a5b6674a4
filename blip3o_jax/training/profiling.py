"""An xprof trace of a few steps."""

import shutil
import tempfile
from pathlib import Path

import jax
from etils import epath

from blip3o_jax.data.outputs import write_atomically


class Profile:
  """Traces `steps` steps from step `first` on into `directory` (TensorBoard's profile plugin and xprof read it).

  The first two steps of a start are left out by the caller: they compile. With 0 steps nothing is done. Use as a
  context manager: a run that ends inside the trace leaves what there is. A trace that cannot be written is told; the
  run goes on.
  """

  def __init__(self, directory: epath.Path, first: int, steps: int):
    self._directory, self._first, self._steps = directory, first, steps
    self._local: Path | None = None  # while a trace runs: its makers know no buckets

  def before(self, step: int) -> None:
    """Call before step `step` is dispatched."""
    if self._steps and step == self._first:
      self._local = Path(tempfile.mkdtemp())
      jax.profiler.start_trace(self._local)

  def after(self, step: int, result: object) -> None:
    """Call after it; waits for `result` at the end of the trace, so that the devices' part is in it."""
    if self._local and step >= self._first + self._steps - 1:
      jax.block_until_ready(result)
      self._stop()

  def _stop(self) -> None:
    local, self._local = self._local, None
    try:
      jax.profiler.stop_trace()
      for file in filter(Path.is_file, local.rglob("*")):
        write_atomically(self._directory / file.relative_to(local), file.read_bytes())
    except Exception as error:  # disks and buckets fail in more ways than have names
      print(f"WARNING: no profile, {self._directory} cannot be written ({error})", flush=True)
    else:
      print(f"profile: {self._directory}", flush=True)
    finally:
      shutil.rmtree(local, ignore_errors=True)

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *error) -> None:
    if self._local:
      self._stop()
