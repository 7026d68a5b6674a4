"""SIGTERM and SIGINT become a flag that is read between steps."""

import signal
import threading


class StopFlag:
  """Inside the `with`, the first SIGTERM or SIGINT sets `requested`; a second one acts as it did before.

  Orbax's own pre-emption point never fires in a single process, hence this. In a job of several processes SIGTERM
  belongs to JAX's pre-emption service, which makes all of them stop at the same step: pass `enabled=False` there.
  """

  def __init__(self, *, enabled: bool = True):
    self.requested = False
    self._enabled = enabled and threading.current_thread() is threading.main_thread()
    self._previous: dict[int, object] = {}

  def __enter__(self) -> "StopFlag":
    if self._enabled:
      self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *error) -> None:
    self._restore()

  def _handle(self, number, frame) -> None:
    self.requested = True
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
