"""A job of 5,000 prompts in miniature: killed at random moments, gone on with on other numbers of devices and hosts."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax.data import shapes

PICTURES = 5000
SETTINGS = {"steps": 1, "decoder_steps": 1, "decoder_guidance": 1.0}


def start(directory, work, devices, **more):
  words = [sys.executable, "-m", "blip3o_jax", "generate", "--model", directory, "--prompts", work / "p.jsonl"]
  words += ["--out", work / "out", "--num", 1, "--batch-size", 64, "--compile-cache", work / "programs"]
  words += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
  env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | more
  with open(work / "err", "ab") as err:
    return subprocess.Popen([str(word) for word in words], env=env, stdout=subprocess.PIPE, stderr=err, text=True)


def pictures(work):
  return {path: path.stat().st_mtime_ns for path in (work / "out").glob("pictures/*/*.png")}


@pytest.mark.slow
def test_every_picture_exactly_once(tiny_directory, tmp_path):
  captions = [caption.text for caption in shapes.seen_prompts() + shapes.heldout_prompts()]
  rows = [{"prompt": captions[i % len(captions)], "seed": i} for i in range(PICTURES)]
  (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  chance, seen, counts = random.Random(0), {}, []
  for devices, how in [(1, signal.SIGKILL), (2, signal.SIGKILL), (4, signal.SIGTERM), (2, signal.SIGKILL)]:
    process = start(tiny_directory, tmp_path, devices)
    deadline = time.time() + 300
    while len(pictures(tmp_path)) < len(seen) + 300:
      assert process.poll() is None and time.time() < deadline, (tmp_path / "err").read_text()[-3000:]
      time.sleep(0.05)
    time.sleep(chance.random())
    process.send_signal(how)
    assert process.wait(timeout=60) == (75 if how == signal.SIGTERM else -signal.SIGKILL)
    now = pictures(tmp_path)
    assert all(now[path] == when for path, when in seen.items())  # what is finished is not drawn again
    seen, counts = now, [*counts, len(now)]
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
  print(f"pictures after each kill: {counts}")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    pod = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
  processes = [start(tiny_directory, tmp_path, 2, JAX_PROCESS_ID=str(i), **pod) for i in range(2)]
  assert [p.wait(timeout=500) for p in processes] == [0, 0], (tmp_path / "err").read_text()[-3000:]

  last = pictures(tmp_path)
  assert len(last) == PICTURES and all(last[path] == when for path, when in seen.items())
  assert not list((tmp_path / "out").rglob("*.tmp"))
  records = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
  assert [record["row"] for record in records] == list(range(PICTURES))
  assert {tmp_path / "out" / record["file"] for record in records} == set(last)
  for record, row in zip(records, rows, strict=True):
    with Image.open(tmp_path / "out" / record["file"]) as picture:
      picture.load()
      assert (picture.text["prompt"], picture.text["seed"]) == (row["prompt"], str(row["seed"]))
  model = blip3o_jax.load(tiny_directory)
  some = chance.sample(range(PICTURES), 64)
  drawn = model.generate([rows[i]["prompt"] for i in some], seed=[rows[i]["seed"] for i in some], **SETTINGS)
  found = np.stack([np.asarray(Image.open(tmp_path / "out" / records[i]["file"])) for i in some]).astype(int)
  assert (np.abs(found - np.stack([row[0] for row in drawn])) <= 1).mean() > 0.999
