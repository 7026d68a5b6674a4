"""The same losses on one device, on eight, in two processes, and from one to the other; constraints and collectives."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import sharded
import toy
from PIL import Image

import blip3o_jax
from blip3o_jax.planning import topology
from blip3o_jax.training import trainer

EIGHT = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_log_compiles", True)
import toy
from blip3o_jax.sharding import distributed
from blip3o_jax.training import trainer
distributed.start()
toy.install()
workdir = sys.argv[1]
for name, sizes in [("one", (1, 1, 1, 1)), ("slices", (2, 2, 2, 1)), ("tensor", (1, 1, 4, 2))]:
  mesh = dict(zip(("slice", "data", "fsdp", "tensor"), sizes))
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


def test_eight_devices(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", EIGHT, str(tmp_path)], capture_output=True, text=True, env=env(), timeout=300
  )
  assert done.returncode == 0, done.stderr[-3000:]
  one = toy.losses(tmp_path / "one")
  for name in ("slices", "tensor"):
    other = toy.losses(tmp_path / name)
    np.testing.assert_allclose([other[s] for s in one], list(one.values()), rtol=1e-5)
  counts = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines() if line[:1] == "C"}
  assert counts["CONSTRAINTS"] >= 1 and counts["COLLECTIVES"] >= 1, counts
  assert "'fsdp'" in done.stdout  # the moments are cut up as the parameters are
  # Three runs and one lowering: no second step compiled again, for which the state must start on its final sharding.
  assert done.stderr.count("Compiling jit(step)") == 4
  assert "Involuntary full rematerialization" not in done.stderr


@pytest.mark.slow
def test_muon_is_spread_over_the_layers(tmp_path):
  """Each device keeps the momentum of some layers and does the products of these alone; the losses stay the same."""
  muon = {"steps": 5, "optimizer": {"name": "muon"}}
  runs = [{"name": "one", "mesh": {"data": 1}} | muon, {"name": "two", "mesh": {"data": 2}} | muon]
  status, (out,) = finish([sharded.run(tmp_path, *runs, devices=2)])
  assert status == [0], out[-3000:]
  one, two = (toy.losses(tmp_path / name) for name in ("one", "two"))
  assert len(one) == 5 and one[5] != one[1]
  np.testing.assert_allclose([two[step] for step in one], list(one.values()), rtol=1e-5)

  pytest.importorskip("libtpu")
  config = trainer.complete(sharded.config(**muon))
  program = trainer.build(config, topology.get("v5e:2x2").mesh({"data": 2, "fsdp": 2}))
  where = {jax.tree_util.keystr(path): x.sharding.spec for path, x in jax.tree.leaves_with_path(program.state)}
  kernels = {path: spec for path, spec in where.items() if "layers" in path and "kernel" in path}
  assert {spec[0] for path, spec in kernels.items() if "opt_state" in path} == {"data"}
  assert {spec[0] for path, spec in kernels.items() if "opt_state" not in path} == {None}


def test_goldens():
  """Where every parameter lies, and what a step sends: a change is shown line by line (tests/shardings.py)."""
  script = Path(__file__).parents[1] / "shardings.py"
  done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env(JAX_PLATFORMS="cpu"))
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  assert "Involuntary full rematerialization" not in done.stderr


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def finish(processes):
  """([status], [stdout and stderr]) of processes when all have ended."""
  outs = [p.communicate(timeout=900) for p in processes]
  return [p.returncode for p in processes], ["".join(text or "" for text in out) for out in outs]


@pytest.mark.slow
def test_the_real_model_on_every_mesh(tmp_path):
  """The generation stage, 50 steps in float32: on one device, eight cut in every way, two processes of four. One of the
  cuts draws samples on the way, which changes no loss either.
  """
  one = {"name": "one", "mesh": {"data": 1}}
  mixed = {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
  cuts = [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 4, "tensor": 2}, mixed]
  runs = [{"name": "-".join(f"{axis}{n}" for axis, n in cut.items()), "mesh": cut} for cut in cuts]
  tokenizer = f"{blip3o_jax.__path__[0]}/assets/micro/tokenizer"
  quick = {"steps": 2, "decoder_steps": 2, "decoder_guidance": 1.0}
  prompts = ["a red circle", "two blue squares", "a star"]
  runs[3] |= {"sample_every": 20, "sample_prompts": prompts, "sampling": quick, "tokenizer": tokenizer}
  eight = sharded.run(tmp_path / "eight", one, *runs, devices=8)
  status, (out,) = finish([eight])
  assert status == [0], out[-3000:]
  assert "Involuntary full rematerialization" not in out
  port = free_port()
  pods = [sharded.run(tmp_path / "two", runs[0], runs[3], devices=4, port=port, index=i, processes=2) for i in range(2)]
  status, outs = finish(pods)
  assert status == [0, 0], outs
  assert not any("Involuntary full rematerialization" in out for out in outs)
  expected = toy.losses(tmp_path / "eight/one")
  assert len(expected) == 50
  for workdir in [*(tmp_path / "eight" / run["name"] for run in runs), *(tmp_path / "two").iterdir()]:
    found = toy.losses(workdir)
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=1e-5, err_msg=str(workdir))
  name = runs[3]["name"]
  sheets = [[_pixels(tmp_path / job / name / f"samples/{step}.png") for step in (20, 40)] for job in ("eight", "two")]
  assert sheets[0][0].shape == (32, 32, 3) and (sheets[0][0][16:, 16:] == 255).all()
  assert not np.array_equal(*sheets[0])  # the weights have moved
  np.testing.assert_allclose(*np.asarray(sheets, np.int32), atol=2)


def _pixels(path):
  return np.asarray(Image.open(path))


def pod(workdir, args, *, devices=1, count=2):
  """`count` processes of the toy that are one job, each with `devices` devices. `workdir` may be a function of i."""
  port = free_port()
  names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  place = workdir if callable(workdir) else lambda i: workdir
  start = lambda i: toy.run(
    place(i), args, env=env(JAX_NUM_CPU_DEVICES=str(devices), JAX_PROCESS_ID=str(i), **names), **pipes
  )
  return [start(i) for i in range(count)]


def alone(workdir, args, *, devices):
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  return toy.run(workdir, args, env=env(JAX_NUM_CPU_DEVICES=str(devices)), **pipes)


def same(ours, expected, rtol):
  """The same samples at every step, to the bit, and the same losses to `rtol`."""
  a, b = (trainer.metrics.read(workdir / "metrics.jsonl") for workdir in (ours, expected))
  assert [line["step"] for line in a] == [line["step"] for line in b]
  assert [line["ids"] for line in a] == [line["ids"] for line in b]
  np.testing.assert_allclose([line["loss"] for line in a], [line["loss"] for line in b], rtol=rtol)


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_anywhere(tmp_path):
  """Real jax.distributed over gloo. SIGTERM to one of two processes: both save at the same step and say 75. The run
  goes on in two processes, to the bit; or on another number of processes and devices, and another mesh."""
  args = lambda **mesh: json.dumps({"mesh": mesh, "data": {"sleep": 0.05}, "steps": 60, "trainable": ["head/", "enc/"]})
  two = args(data=2, fsdp=4)
  status, outs = finish(pod(tmp_path / "whole", two, devices=4))
  assert status == [0, 0], outs
  # Layers cut over both: they read the same rows.
  status, outs = finish(pod(tmp_path / "layers", args(data=2, tensor=4), devices=4))
  assert status == [0, 0], outs
  same(tmp_path / "layers", tmp_path / "whole", rtol=1e-5)
  status, outs = finish(pod(tmp_path / "over", args(data=1, tensor=2), devices=1))
  assert status == [0, 0], outs
  same(tmp_path / "over", tmp_path / "whole", rtol=1e-5)

  pods = pod(tmp_path / "cut", two, devices=4)
  toy.wait_for(tmp_path / "cut", 5, pods[0])
  pods[1].send_signal(signal.SIGTERM)
  status, outs = finish(pods)
  assert status == [75, 75], outs
  shutil.copytree(tmp_path / "cut", tmp_path / "moved")
  status, outs = finish(pod(tmp_path / "cut", two, devices=4))
  assert status == [0, 0], outs
  same(tmp_path / "cut", tmp_path / "whole", rtol=0)

  process = alone(tmp_path / "moved", args(fsdp=4, tensor=2), devices=8)
  toy.wait_for(tmp_path / "moved", 25, process)
  process.send_signal(signal.SIGTERM)
  status, outs = finish([process])
  assert status == [75], outs
  status, outs = finish([alone(tmp_path / "moved", args(data=1), devices=1)])
  assert status == [0], outs
  same(tmp_path / "moved", tmp_path / "whole", rtol=1e-5)


@pytest.mark.slow
def test_a_disk_that_is_not_shared_is_told_before_anything_is_trained(tmp_path):
  status, outs = finish(pod(lambda i: tmp_path / f"disk{i}", json.dumps({"mesh": {"data": 2}})))
  assert status == [2, 2] and all("processes [1] do not see" in out for out in outs), outs


@pytest.mark.slow
def test_a_killed_process_does_not_leave_the_other_waiting(tmp_path):
  """kill -9 of one of two: the other ends by itself, with a status that is no success, and the job goes on exactly."""
  args = json.dumps({"mesh": {"data": 2}, "data": {"sleep": 0.05}, "steps": 40, "save_every": 4})
  status, outs = finish(pod(tmp_path / "whole", args))
  assert status == [0, 0], outs
  pods = pod(tmp_path / "cut", args)
  toy.wait_for(tmp_path / "cut", 15, pods[0])
  pods[1].kill()
  start = time.monotonic()
  status, outs = finish(pods)
  assert status[0] not in (0, 75) and time.monotonic() - start < 300, outs  # JAX's heartbeat, 100 s
  status, outs = finish(pod(tmp_path / "cut", args))
  assert status == [0, 0], outs
  same(tmp_path / "cut", tmp_path / "whole", rtol=0)
