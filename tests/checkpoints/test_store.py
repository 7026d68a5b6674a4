"""Orbax behind the store: exact, pruned, atomic, and honest about a full disk."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from blip3o_jax.checkpoints.store import Store
from blip3o_jax.errors import UserError


def tree(value: float):
  return {
    "a": {"w": jnp.full((3, 4), value)},
    "step": jnp.int32(value),
    "half": jnp.full(2, value, jnp.bfloat16),
    "no": {},
  }


def abstract(of):
  place = SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), of)


def test_round_trip_and_pruning(tmp_path):
  with Store(tmp_path / "c", keep=2) as store:
    assert store.latest() is None
    for step in (1, 2, 3):
      store.save(step, tree(step), {"position": step})
    store.save(3, tree(99), {"position": 99})  # there already: left alone
  assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]
  with Store(tmp_path / "c") as store:
    state, record = store.restore(store.latest(), abstract(tree(0)))
  assert record == {"position": 3} and state["half"].dtype == jnp.bfloat16
  jax.tree.map(np.testing.assert_array_equal, state, tree(3))


def test_a_save_does_not_see_what_the_next_step_writes(tmp_path):
  """The step donates its state: the arrays of a save that still runs are reused by the next step."""
  step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
  state = {"w": jnp.zeros((512, 1024))}
  with Store(tmp_path, keep=100) as store:
    for n in range(1, 6):
      state = step(state)
      store.save(n, state, {})
  with Store(tmp_path, keep=100) as store:
    for n in range(1, 6):
      restored, _ = store.restore(n, abstract(state))
      assert set(np.unique(restored["w"])) == {n}


def test_another_structure_is_refused(tmp_path):
  with Store(tmp_path) as store:
    store.save(1, tree(1), {})
    store.settle()
    for other in ({**tree(0), "extra": jnp.zeros(3)}, {**tree(0), "a": {"w": jnp.zeros((3, 5))}}, {"a": tree(0)["a"]}):
      with pytest.raises(UserError, match="1 "):
        store.restore(1, abstract(other))


def test_half_written_steps_do_not_count(tmp_path):
  with Store(tmp_path) as store:
    store.save(1, tree(1), {})
  leftover = tmp_path / "2.orbax-checkpoint-tmp-0"
  leftover.mkdir()
  (leftover / "state").write_text("")
  with Store(tmp_path) as store:
    assert store.latest() == 1
    store.save(2, tree(2), {})  # waits for the cleaning, which goes on behind
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2"]


def test_a_file_in_the_way(tmp_path):
  (tmp_path / "c").write_text("")
  with pytest.raises(UserError, match="cannot write"):
    Store(tmp_path / "c")


def test_a_directory_that_goes_away_and_comes_back(tmp_path):
  told = []
  with Store(tmp_path / "c", tell=told.append) as store:
    store.save(1, tree(1), {})
    store.settle()
    (tmp_path / "c").rename(tmp_path / "away")
    (tmp_path / "c").write_text("in the way")
    store.save(2, tree(2), {})
    store.settle()
    assert len(told) == 1 and told[0].startswith("step 2 was not saved") and "nothing is saved" in told[0]
    with pytest.raises(UserError, match="step 2 could not be saved in .*/c "):
      store.save(2, tree(2), {}, insist=True)
    (tmp_path / "c").unlink()
    (tmp_path / "away").rename(tmp_path / "c")
    assert store.latest() == 1
    store.save(3, tree(3), {}, insist=True)
    assert store.latest() == 3 and len(told) == 1
    state, _ = store.restore(3, abstract(tree(0)))
  assert float(state["step"]) == 3


def test_a_really_full_disk(tmp_path):
  """A file size limit makes the very write fail, in Orbax's own threads; then there is room again."""
  code = f"""
import resource, signal, sys, time
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import numpy as np, jax.numpy as jnp
from blip3o_jax.checkpoints.store import Store
from blip3o_jax.errors import UserError
state = {{"w": jnp.asarray(np.random.default_rng(0).normal(size=(1000, 1000)))}}
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with Store({str(tmp_path)!r}, keep=5, tell=lambda words: print("TOLD", words)) as store:
  store.save(1, state, {{}}, insist=True)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  store.save(2, state, {{}})
  while store._pending:
    store.settle(wait=False)
    time.sleep(0.01)
  store.save(3, state, {{}})
  print("latest", store.latest())  # nobody has looked how the third one ended
  try:
    store.save(4, state, {{}}, insist=True)
  except UserError as error:
    print("UserError", error)
  resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
  store.save(5, state, {{}})
with Store({str(tmp_path)!r}, keep=5) as store:
  print("steps", store._steps(), "latest", store.latest())
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  lines = done.stdout.splitlines()
  assert len(lines) == 5, done.stdout + done.stderr[-3000:]
  for line, step in zip((lines[0], lines[2]), (2, 3), strict=True):
    assert line == f"TOLD step {step} was not saved (File too large); the last saved step is 1"
  assert lines[1] == "latest 1" and lines[3].startswith("UserError step 4 could not be saved")
  assert lines[4] == "steps [1, 5] latest 5"


_TWO = """
import resource, signal, sys, time
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import jax, numpy as np
from jax.sharding import PartitionSpec
from blip3o_jax.checkpoints.store import Store
from blip3o_jax.sharding import distributed
from blip3o_jax.sharding.mesh import make_mesh
distributed.start()
cut = jax.NamedSharding(make_mesh({"data": 2}), PartitionSpec("data"))
rows = np.random.default_rng(jax.process_index()).normal(size=(500, 1000))
state = {"w": jax.make_array_from_process_local_data(cut, rows)}
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with Store(sys.argv[1], keep=5, timeout_s=10, tell=lambda words: print("TOLD", words)) as store:
  store.save(1, state, {}, insist=True)
  if jax.process_index() == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  store.save(2, state, {})
  store.settle()
  resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
  store.save(3, state, {}, insist=True)
  print("steps", store._steps())
"""


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_of_two_processes(tmp_path):
  """Both tell, neither waits for ever, and both go on."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  clean["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
  pods = [
    subprocess.Popen(
      [sys.executable, "-c", _TWO, str(tmp_path)],
      env=clean | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  outs = [p.communicate(timeout=200) for p in pods]
  assert [p.returncode for p in pods] == [0, 0], outs
  for out, _ in outs:
    lines = [line for line in out.splitlines() if line.startswith(("TOLD", "steps"))]  # Gloo says more
    assert lines[0].startswith("TOLD step 2 was not saved") and "the last saved step is 1" in lines[0], outs
    assert lines[1] == "steps [1, 3]"
  assert "File too large" in outs[1][0]
