"""Checkpoints of one run under one directory (Orbax): asynchronous, atomic, pruned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from blip3o_jax.errors import UserError

# What TensorStore and the system say when a disk does not take any more.
_NO_WRITE = ("no space left", "quota exceeded", "resource_exhausted", "file too large", "read-only file system")


class Store:
  """Saves trees of arrays with a small JSON record, by step. A step is there completely or not at all.

  Saving returns once the arrays are copied off the device; writing goes on behind the next steps. A failed write shows
  at the next call. Use as a context manager: leaving it waits for what is being written.
  """

  def __init__(self, directory: Path | str, *, keep: int = 1):
    self.directory = Path(directory).absolute()
    checkpointing = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpointing.LatestN(keep),
      # The caller decides when to save, with one exception: Orbax's own policy that answers a pre-emption notice.
      save_decision_policy=checkpointing.AnySavePolicy(
        [checkpointing.FixedIntervalPolicy(1), checkpointing.PreemptionCheckpointingPolicy()]
      ),
      cleanup_tmp_directories=True,  # what a killed process left half written
    )
    with _explained(self.directory):
      self.directory.mkdir(parents=True, exist_ok=True)
      handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
      self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

  def latest(self) -> int | None:
    """The newest complete step."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Start saving `state` (a pytree of jax.Arrays) and `record` (JSON) as `step`; no-op if it is there already.

    Raises:
      UserError: no space, or the directory cannot be written.
    """
    if step == self.latest():
      return
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(dict(record)))
    with _explained(self.directory):
      self._manager.save(step, args=items, force=True)

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
      first = (str(error).strip().splitlines() or [type(error).__name__])[0]
      raise UserError(
        f"{self.directory / str(step)} does not fit or is damaged ({first[:200]}); delete it to go on from before it"
      ) from error
    return restored["state"], restored["record"]

  def reached_preemption(self, step: int) -> bool:
    """Whether the scheduler of a multi-process job has asked to stop, agreed by all processes at the same step."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Until everything is on disk. Raises UserError as `save` does."""
    with _explained(self.directory):
      self._manager.wait_until_finished()

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, *error) -> None:
    with _explained(self.directory):
      self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """{"a.b.0": shape}; the same names whether a level is a dict, a dataclass or a named tuple, as Orbax stores them."""
  names = lambda path: ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
  return {names(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class _explained:
  """Disk trouble becomes one line for the user."""

  def __init__(self, directory: Path):
    self._directory = directory

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if error is None or isinstance(error, UserError):
      return
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
      raise UserError(f"cannot write checkpoints to {self._directory}: {error}") from error
    chain = error
    while chain is not None:  # an asynchronous write's own error is the cause of the one that arrives
      if why := [text for text in _NO_WRITE if text in str(chain).lower()]:
        raise UserError(
          f"cannot write a checkpoint to {self._directory} ({why[0]}); free space and run again"
        ) from error
      chain = chain.__cause__ or chain.__context__
