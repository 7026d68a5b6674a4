"""Parts of a job: which there are, whose they are, and when they are finished."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.jobs.parts import Parts, Progress, closing

FACTS = {"prompts": "abc", "num": 2}


def test_parts_depend_on_the_inputs_alone(tmp_path, monkeypatch):
  sizes = {1: (1, 1), 255: (255, 1), 553: (277, 2), 5000: (264, 19), 1_000_000: (3907, 256)}
  for inputs, (count, size) in sizes.items():
    parts = Parts(tmp_path / str(inputs), inputs, FACTS)
    assert (parts.count, parts.size) == (count, size)
  everything = []
  for process in range(3):
    monkeypatch.setattr("jax.process_index", lambda p=process: p)
    monkeypatch.setattr("jax.process_count", lambda: 3)
    mine = Parts(tmp_path / "553", 553, FACTS).unfinished()
    assert len(mine) in (92, 93)
    everything += [i for part in mine for i in part]
  assert sorted(everything) == list(range(553))


def test_a_finished_part_is_not_taken_again(tmp_path):
  parts = Parts(tmp_path, 512, FACTS)
  first, second = parts.unfinished()[:2]
  assert (list(first), list(second)) == ([0, 1], [2, 3])
  parts.finish(second, [{"row": 2}, {"row": 3, "error": "no"}])
  assert Parts(tmp_path, 512, FACTS).unfinished()[:2] == [first, range(4, 6)]
  assert parts.merge() is None and not (tmp_path / "manifest.jsonl").exists()
  assert "does not show all parts" in closing(parts, "rows")
  for part in parts.unfinished():
    parts.finish(part, [{"row": i} for i in part])
  with pytest.raises(UserError, match="1 of 512 rows could not be used, the others are done"):
    closing(parts, "rows")
  rows = [json.loads(line)["row"] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
  assert rows == list(range(512))


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
  parts = Parts(tmp_path, 512, FACTS)
  half = tmp_path / "parts" / ".000001.jsonl.0a1b2c3d.tmp"
  half.parent.mkdir()
  half.write_text("{")
  parts.unfinished()
  assert not list(tmp_path.rglob("*.tmp"))


def test_another_job_is_refused(tmp_path):
  Parts(tmp_path, 5, FACTS)
  Parts(tmp_path, 5, FACTS)
  for inputs, facts, words in [(5, {"num": 3}, "its num was 2, is 3"), (6, {}, "its inputs was 5, is 6")]:
    with pytest.raises(UserError, match=words):
      Parts(tmp_path, inputs, FACTS | facts)
  assert json.loads((tmp_path / "job.json").read_text()) == FACTS | {"inputs": 5}
  settings = {f"setting_{i}": i for i in range(100)}  # all of them are too long to be told
  Parts(tmp_path / "set", 5, {"settings": settings})
  with pytest.raises(UserError, match="holds another job: its setting_99 was 99, is 0; give"):
    Parts(tmp_path / "set", 5, {"settings": settings | {"setting_99": 0}})


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_a_file_of_something_else_is_told(tmp_path, content):
  (tmp_path / "job.json").write_text(content)
  with pytest.raises(UserError, match=r"job\.json"):
    Parts(tmp_path, 5, FACTS)


_JOBS = """
import functools, signal, sys, time
import jax
# JAX's own shutdown waits five minutes; here it has no patience.
jax.distributed.initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=1)
from blip3o_jax import cli, commands
from blip3o_jax.errors import Preempted
from blip3o_jax.jobs.parts import Parts, closing
signal.signal(signal.SIGTERM, cli._terminated)
commands._start_job()
try:
  for seconds in (3, 30):
    parts = Parts(f"{sys.argv[1]}/{seconds}", 2, {})
    for part in parts.unfinished():
      time.sleep(seconds * jax.process_index())
      parts.finish(part, [{"row": i} for i in part])
    print(closing(parts, "rows"), flush=True)
except Preempted:
  sys.exit(75)
"""


def test_the_first_of_two_processes_waits_for_the_last_unless_it_is_told_to_stop(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    pod = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
  env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | pod
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  words = [sys.executable, "-c", _JOBS, str(tmp_path)]
  processes = [subprocess.Popen(words, env=env | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(2)]
  for process in processes:  # all parts are there for both
    assert process.stdout.readline() == f"{tmp_path / '3' / 'manifest.jsonl'}\n", process.stderr.read()
  time.sleep(0.5)
  for process in processes:
    process.terminate()
  said = [process.communicate(timeout=60) for process in processes]
  assert [process.returncode for process in processes] == [75, 75], said


def test_progress(monkeypatch, capsys):
  now = [100.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  progress = Progress(1000, "pictures")
  now[0] += 5
  progress.add(10)
  assert capsys.readouterr().err == ""  # not every moment
  now[0] += 15
  progress.add(30)
  assert capsys.readouterr().err == "40 of 1000 pictures, 2 a second, 8 min 0 s left\n"
  now[0] += 1
  progress.add(960)
  assert capsys.readouterr().err == "1000 of 1000 pictures, 47.6 a second\n"
