"""Starting JAX, on one machine or on many, and barriers that do not wait for ever."""

import os
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from blip3o_jax.errors import UserError

# What tells that this process is one of several. Cloud TPU pods and SLURM steps are found out by JAX itself.
_COORDINATOR = "JAX_COORDINATOR_ADDRESS"


def start() -> None:
  """Call before anything touches a device; a second call does nothing.

  Several processes: joined when JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, in a SLURM step
  of more than one task, on a TPU pod of more than one host, or where BLIP3O_DISTRIBUTED=1 says so.

  Raises:
    UserError: the coordinator cannot be reached.
  """
  if jax.distributed.is_initialized():
    return
  explicit = os.environ.get(_COORDINATOR)
  slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
  pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
  # Set by the launchers: on Cloud TPU machines only a metadata server knows of the other hosts, and JAX asks it.
  pod |= os.environ.get("BLIP3O_DISTRIBUTED") == "1"
  try:
    if explicit:
      jax.distributed.initialize(
        explicit, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"]), initialization_timeout=300
      )
    elif slurm or pod:
      jax.distributed.initialize(initialization_timeout=300)
    _spare_threads()
  except KeyError as error:
    raise UserError(f"{_COORDINATOR} is set but {error.args[0]} is not; set all three or none") from error
  except (RuntimeError, ValueError) as error:  # nobody there, or numbers that are none
    where = explicit or "the coordinator found by JAX"
    raise UserError(f"could not join the other processes at {where}: {str(error).splitlines()[0]}") from error


def _spare_threads() -> None:
  """XLA's CPU back end runs independent collectives of a program at once, and each blocks a thread until its partners
  come. Where simulated devices outnumber cores its pool has one thread a device: on a mesh of three axes every thread
  came to wait for a collective whose partners had none left. Has no effect once the back end runs.
  """
  devices = jax.config.jax_num_cpu_devices
  if devices > len(os.sched_getaffinity(0)):
    os.environ.setdefault("PJRT_NPROC", str(4 * devices))


def barrier(name: str, timeout_s: float = 600.0) -> None:
  """Wait until every process is here.

  Raises:
    UserError: one of them has not come within `timeout_s` seconds.
  """
  if jax.process_count() == 1:
    return
  try:
    ocp.multihost.get_barrier_sync_fn()(key=f"blip3o_jax/{name}", timeout_ms=int(timeout_s * 1000))
  except Exception as error:
    waited = f"waiting at most {timeout_s:.0f} s"
    raise UserError(f"not every process reached {name!r}, {waited}; look for one that died") from error


def wait_for_all() -> None:
  """Where a process has no more to do: wait for those that have, for days if need be.

  One that ends waits for the others in JAX's own shutdown, which after five minutes aborts all of them. One that dies
  ends this waiting, and the others with it, when its heartbeats have been missed for a minute or two.

  Raises:
    UserError: another process failed.
  """
  failed = []

  def wait():
    try:
      barrier("the end", timeout_s=7 * 86400)
    except UserError as error:
      failed.append(error)

  # In a thread, as the barrier itself would let no signal through.
  waiting = threading.Thread(target=wait, daemon=True)
  waiting.start()
  waiting.join()
  if failed:
    raise failed[0]


def everyone(value: int | bool) -> np.ndarray:
  """The number that each process gives, [processes] in their order; all of them call this."""
  return multihost_utils.process_allgather(np.asarray(value)).reshape(-1)


def whole(x: jax.Array | np.ndarray) -> np.ndarray:
  """The whole of an array that may lie on the devices of several processes; all of them call this."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)
