"""The doctor sees what is right, and what is wrong."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip3o_jax import verification
from blip3o_jax.errors import CheckFailed
from blip3o_jax.nn import attention
from blip3o_jax.planning import doctor

ROOT = Path(__file__).resolve().parents[2]
FLOW = ROOT / "tests" / "golden" / "flow"


def test_recordings_are_replayed_and_judged(monkeypatch):
  (left_out,) = doctor.recorded([FLOW], None, "bfloat16")
  assert left_out.ok and "a CPU rounds no products" in left_out.note
  monkeypatch.setattr(doctor.jax, "default_backend", lambda: "tpu")
  found = []
  replay = lambda *words: found or found.extend(verification.replay(*words)) or found
  for precision in ("bfloat16", "highest"):
    (check,) = doctor.recorded([FLOW], replay, precision)
    assert check.ok and check.figures["recordings"] == 1 and 0 < check.figures["worst_error"] < 1e-3
  worse = lambda *_: [dataclasses.replace(line, status="miss", error=0.2) for line in found if line.error is not None]
  for precision in ("bfloat16", "highest"):
    (check,) = doctor.recorded([FLOW], worse, precision)
    assert not check.ok and "flow: " in check.note


def test_the_kernel_is_held_against_plain_attention(monkeypatch):
  (check,) = doctor.kernel("float32")
  assert check.ok and check.figures["error"] < 1e-4
  plain = attention.plain_attention
  monkeypatch.setattr(attention, "splash_attention", lambda q, k, v, *_, scale, **__: plain(q, k, v, None, scale=scale))
  (check,) = doctor.kernel("float32")  # a kernel that forgets the mask
  assert not check.ok


def test_one_wrong_check_is_told_at_the_end(monkeypatch, tmp_path, capsys):
  right, wrong = doctor.Check("a", True, {"seconds": 0.5}), doctor.Check("b", False, {}, "broken")
  for name in ("recorded", "kernel", "training", "picture"):
    monkeypatch.setattr(doctor, name, lambda *_, found=(wrong if name == "training" else right): [found])
  with pytest.raises(CheckFailed, match="b did not hold"):
    doctor.run("micro", tmp_path, [], verification.replay)
  out = capsys.readouterr().out
  assert "FAIL b" in out and "ok   a" in out and "broken" in out
  result = json.loads((tmp_path / "doctor.json").read_text())
  assert not result["ok"] and [c["ok"] for c in result["checks"]] == [False] + [True] * 5
  assert {"date", "driver", "jax", "devices"} <= set(result["machine"]) and result["model"] == "micro"


def test_a_check_that_breaks_is_told_and_the_rest_is_looked_at(monkeypatch, tmp_path, capsys):
  def kernel(dtype):
    raise RuntimeError("INTERNAL: no such\nkernel on this device")

  for name in ("recorded", "training", "picture"):
    monkeypatch.setattr(doctor, name, lambda *_: [doctor.Check("a", True, {})])
  monkeypatch.setattr(doctor, "kernel", kernel)
  with pytest.raises(CheckFailed, match="attention kernel, float32, attention kernel, bfloat16 did not hold"):
    doctor.run("micro", tmp_path, [], verification.replay)
  assert capsys.readouterr().out.count("RuntimeError: INTERNAL: no such kernel on this device") == 2
  assert [c["ok"] for c in json.loads((tmp_path / "doctor.json").read_text())["checks"]] == [True] * 4 + [False] * 2


@pytest.mark.slow
def test_the_whole_visit_on_a_cpu(tmp_path):
  """The words are those of a user. Two minutes are the aim; as other tests run beside it, twice that fails."""
  env = {k: v for k, v in os.environ.items() if k != "JAX_DEFAULT_MATMUL_PRECISION"}
  start = time.monotonic()
  words = [sys.executable, "-m", "blip3o_jax", "doctor", "--out", str(tmp_path)]
  done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)
  seconds = time.monotonic() - start
  assert done.returncode == 0, done.stdout + done.stderr
  assert "all is well" in done.stdout and (tmp_path / "doctor.png").exists() and seconds < 240
  result = json.loads((tmp_path / "doctor.json").read_text())
  names = [check["name"] for check in result["checks"]]
  assert result["ok"] and "training step" in names and "save and restore" in names
