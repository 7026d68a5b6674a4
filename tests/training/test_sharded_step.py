"""The same losses on one device, on four, and in two processes; and the constraints are really in the program."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import toy

FOUR = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_log_compiles", True)
import toy
from blip3o_jax.training import trainer
toy.install()
workdir = sys.argv[1]
for name, sizes in [("one", (1, 1, 1)), ("fsdp", (2, 2, 1)), ("tensor", (1, 2, 2))]:
  mesh = dict(zip(("data", "fsdp", "tensor"), sizes))
  config = toy.config(steps=5, mesh=mesh, trainable=("head/", "enc/"), ema_decay=0.9)
  trainer.train(config, f"{workdir}/{name}")

config = trainer.complete(toy.config(mesh={"data": 2, "fsdp": 2}, trainable=("head/", "enc/")))
mesh = trainer.make_mesh(config.mesh, batch_size=16)
program = trainer.build(config, mesh)
print({str(x.sharding.spec) for x in jax.tree.leaves(program.state.opt_state)})
batch = next(toy.make_loader({}, batch_size=16, seed=0, start_step=0))
batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items() if k != "caption"}
with jax.set_mesh(mesh):
  lowered = program.step.lower(program.state, program.frozen, batch)
text = lowered.as_text()
print("CONSTRAINTS", text.count("sharding_constraint") + text.count("@Sharding"))
compiled = lowered.compile().as_text()
print("COLLECTIVES", compiled.count("all-reduce(") + compiled.count("reduce-scatter(") + compiled.count("all-gather("))
"""


def env(**more):
  clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
  return clean | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | more


def test_four_devices(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", FOUR, str(tmp_path)], capture_output=True, text=True, env=env(), timeout=300
  )
  assert done.returncode == 0, done.stderr[-3000:]
  one = toy.losses(tmp_path / "one")
  for name in ("fsdp", "tensor"):
    other = toy.losses(tmp_path / name)
    np.testing.assert_allclose([other[s] for s in one], list(one.values()), rtol=1e-5)
  counts = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines() if line[:1] == "C"}
  assert counts["CONSTRAINTS"] >= 1 and counts["COLLECTIVES"] >= 1, counts
  assert "'fsdp'" in done.stdout  # the moments are cut up as the parameters are
  # Three runs and one lowering: no second step compiled again, for which the state must start on its final sharding.
  assert done.stderr.count("Compiling jit(step)") == 4
  assert "Involuntary full rematerialization" not in done.stderr


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(tmp_path):
  """Real jax.distributed over gloo: SIGTERM to one process, both save at the same step."""
  import signal

  args = json.dumps({"mesh": {"data": 2}, "data": {"sleep": 0.05}, "steps": 60})

  def start(workdir):
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    pods = [
      env(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i)) for i in (0, 1)
    ]
    return [toy.run(workdir, args, env=e, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for e in pods]

  def finish(processes):
    outs = [p.communicate(timeout=240)[0] for p in processes]
    return [p.returncode for p in processes], outs

  status, outs = finish(start(tmp_path / "whole"))
  assert status == [0, 0], outs
  pods = start(tmp_path / "cut")
  toy.wait_for(tmp_path / "cut", 5, pods[0])
  pods[1].send_signal(signal.SIGTERM)
  status, outs = finish(pods)
  assert status == [75, 75], outs
  status, outs = finish(start(tmp_path / "cut"))
  assert status == [0, 0], outs
  assert toy.losses(tmp_path / "cut") == toy.losses(tmp_path / "whole")
  done = toy.run(tmp_path / "single", args)
  assert done.wait() == 0
  single, double = toy.losses(tmp_path / "single"), toy.losses(tmp_path / "whole")
  np.testing.assert_allclose([double[s] for s in single], list(single.values()), rtol=1e-5)
