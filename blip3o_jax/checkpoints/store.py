"""Checkpoints of one run under one directory (Orbax): asynchronous, atomic, pruned."""

import errno
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from blip3o_jax.errors import UserError

_managers = itertools.count()  # barriers of one process group must not share names


class Store:
  """Saves trees of arrays with a small JSON record, by step. A step is there completely or not at all.

  Saving returns once the arrays are copied off the device; writing goes on behind the next steps. A save that fails (no
  space, no such place any more) does not raise: it is told through `tell`, and the next save tries anew. With several
  processes all methods are called by all, and none waits longer than `timeout_s` for another to write. Use as a context
  manager: leaving it waits for what is being written.
  """

  def __init__(
    self, directory: str | os.PathLike, *, keep: int = 1, timeout_s: int = 600, tell: Callable[[str], None] = print
  ):
    """Raises UserError if the directory cannot be made or written."""
    self.directory = epath.Path(directory)
    if "://" not in os.fspath(directory):  # Orbax wants a whole path; that of a bucket is one
      self.directory = self.directory.absolute()
    self._keep, self._timeout, self._tell = keep, timeout_s, tell
    self._manager: ocp.CheckpointManager | None = None
    self._pending: int | None = None
    self._failure: str | None = None
    if why := self._open():
      raise UserError(f"cannot write checkpoints to {self.directory}: {why}")

  def latest(self) -> int | None:
    """The newest complete step."""
    return max(self._steps(), default=None)

  def save(self, step: int, state: Any, record: Mapping[str, Any], *, insist: bool = False) -> None:
    """Start saving `state` (a pytree of jax.Arrays) and `record` (JSON) as `step`; no-op if it is there already.

    Args:
      insist: wait until it is on disk.

    Raises:
      UserError: it was to be on disk and is not.
    """
    self.settle()
    if step in self._steps():
      return
    why = self._start(step, state, record)
    if insist and why is None:
      why = self._outcome()
    if why and insist:
      raise UserError(
        f"step {step} could not be saved in {self.directory} ({why}); {self._standing()}; mend that and run the same "
        "command again"
      )
    if why:
      self._tell(f"step {step} was not saved ({why}); {self._standing()}")

  def settle(self, *, wait: bool = True) -> None:
    """See how the save ended that is under way, and tell if it failed; `wait=False`: only if that can be known now."""
    # With several processes all have to agree, which they do where all of them wait.
    if wait or (jax.process_count() == 1 and self._pending and not self._manager.is_saving_in_progress()):
      step = self._pending
      if why := self._outcome():
        self._tell(f"step {step} was not saved ({why}); {self._standing()}")

  def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """(state, record) of `step`; `abstract` is a tree of ShapeDtypeStructs whose shardings say where each leaf goes.

    Raises:
      UserError: the checkpoint does not have that structure or those shapes.
    """
    try:
      found = self._manager.item_metadata(step)["state"]
      ours, theirs = _shapes(abstract), _shapes(found.tree if hasattr(found, "tree") else found)
      # Said before reading: Orbax cuts or pads an array of another shape without a word.
      if differing := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        name = differing[0]
        raise ValueError(f"{name}: {theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} here")
      items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
      restored = self._manager.restore(step, args=items)
    except (ValueError, KeyError, TypeError, OSError) as error:
      raise UserError(
        f"{self.directory / str(step)} does not fit or is damaged ({_words(error)}); delete it to go on from before it"
      ) from error
    return restored["state"], restored["record"]

  def reached_preemption(self, step: int) -> bool:
    """Whether the scheduler of a multi-process job has asked to stop, agreed by all processes at the same step."""
    return self._manager is not None and self._manager.reached_preemption(step)

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, *error) -> None:
    if error[0] is None:
      self.settle()  # else another error is on its way, and other processes may not come
    self._close()

  # ---- inside

  def _steps(self) -> list[int]:
    """What is complete on disk: a manager's own list counts what it hopes to have written."""
    try:
      if self._manager is None:
        return []
      self._manager.reload()
      return list(self._manager.all_steps())
    except Exception:  # the directory is out of reach: disks and buckets fail in more ways than have names
      return []

  def _agreed(self, why: str | None) -> str | None:
    """`why`, or that of the first process that has one: all of them go on together or not at all."""
    if jax.process_count() == 1:
      return why
    failed = multihost_utils.process_allgather(np.asarray(why is not None))
    return why or (f"process {int(failed.argmax())} could not write its part" if failed.any() else None)

  def _start(self, step: int, state: Any, record: Mapping[str, Any]) -> str | None:
    """Begin to save; or why not."""
    if why := self._open() if self._manager is None else self._agreed(self._unwritable()):
      return why
    self._pending = step
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(dict(record)))
    try:
      self._manager.save(step, args=items, force=True)
    except Exception as error:  # as in `_steps`
      self._failure = _words(error)
    # The other processes of a job learn of it when all settle.
    return self._outcome() if self._failure and jax.process_count() == 1 else None

  def _outcome(self) -> str | None:
    """Wait for the save that is under way; None if it is on disk, or why not (what it left half done is removed)."""
    if self._pending is None:
      return None
    step, why = self._pending, self._failure
    self._pending = self._failure = None
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # as in `_steps`
      why = why or _words(error)
    if why is None and step not in self._steps():
      why = "it was not completed"
    if why := self._agreed(why):
      self._close()
      self._open()
    return why

  def _standing(self) -> str:
    last = self.latest()
    return "nothing is saved yet" if last is None else f"the last saved step is {last}"

  def _open(self) -> str | None:
    """A manager that starts from what is on disk; or why there is none."""
    if why := self._agreed(self._unwritable()):
      return why
    checkpointing = ocp.checkpoint_managers
    several = jax.process_count() > 1
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpointing.LatestN(self._keep),
      # The caller decides when to save, with one exception: Orbax's own policy that answers a pre-emption notice.
      save_decision_policy=checkpointing.AnySavePolicy(
        [checkpointing.FixedIntervalPolicy(1), checkpointing.PreemptionCheckpointingPolicy()]
      ),
      cleanup_tmp_directories=True,  # what a killed or failed save left half written
      create=False,
      async_options=ocp.AsyncOptions(timeout_secs=self._timeout),
      # Naming the processes makes Orbax take barriers that end; its others are collectives, which wait for ever.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        active_processes=set(range(jax.process_count())) if several else None,
        barrier_sync_key_prefix=f"store{next(_managers)}" if several else None,
      ),
    )
    handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
    try:
      self._manager, why = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers), None
    except Exception as error:  # as in `_steps`
      why = _words(error)
    if why := self._agreed(why):
      self._manager = None
    return why

  def _unwritable(self) -> str | None:
    """Why a small file cannot be written, tried by every process before all of them start on a save together."""
    probe = self.directory / f".probe.{os.getpid()}.{jax.process_index()}"
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      try:
        probe.write_bytes(bytes(4096))
      finally:
        probe.unlink(missing_ok=True)
    except Exception as error:  # as in `_steps`
      return _words(error)
    return None

  def _close(self) -> None:
    if self._manager is None:
      return
    try:
      self._manager.close()
    except Exception:  # a failed save raises once more; it has been told, or another error is on its way
      pass
    self._manager = None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """{"a.b.0": shape}; the same names whether a level is a dict, a dataclass or a named tuple, as Orbax stores them."""
  names = lambda path: ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
  return {names(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _words(error: BaseException) -> str:
  """What went wrong in a few words: the system's own if they are anywhere in the chain of errors, or the first line."""
  chain, cause = [], error
  while cause is not None:  # an asynchronous write's own error is the cause of the one that arrives
    chain.append(str(cause))
    cause = cause.__cause__ or cause.__context__
  for text in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)):
    if any(text.lower() in words.lower() for words in chain):
      return text
  return (chain[0].strip().splitlines() or [type(error).__name__])[0][:200]
