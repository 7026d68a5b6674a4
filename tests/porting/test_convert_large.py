"""A checkpoint of realistic size and layout: what its conversion takes (slow)."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import GOLDEN

from blip3o_jax.porting import safetensors_io
from blip3o_jax.porting.safetensors_io import Spec

SHARD = 1_500_000_000
LAYERS = 9
GIB = 1 << 30


def make(path):
  """The smaller release with nine layers of its language model: 4 GiB and more in four files. -> bytes."""
  keys = json.loads((GOLDEN / "keys" / "blip3o_4b.json").read_text())
  dropped = tuple(f"model.layers.{i}." for i in range(LAYERS, 36)) + ("lm_head.",)
  keys = {key: tuple(shape) for key, shape in keys.items() if not key.startswith(dropped)}
  shards, filled, noise = [{}], 0, np.random.default_rng(0).integers(0, 1 << 14, 1 << 26, np.uint16)
  for key, shape in keys.items():
    if filled + 2 * math.prod(shape) > SHARD:
      shards.append({})
      filled = 0
    shards[-1][key] = Spec(shape, np.dtype(ml_dtypes.bfloat16))
    filled += 2 * math.prod(shape)
  path.mkdir()
  weight_map = {}
  for i, shard in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    arrays = ((key, np.resize(noise, spec.shape).view(ml_dtypes.bfloat16)) for key, spec in shard.items())
    safetensors_io.write(path / file, shard, arrays, {"format": "pt"})
    weight_map |= dict.fromkeys(shard, file)
  (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  config = {"model_type": "qwen2_5_vl", "hidden_size": 2048, "num_hidden_layers": LAYERS, "num_attention_heads": 16}
  config |= {"num_key_value_heads": 2, "intermediate_size": 11008, "tie_word_embeddings": True, "vocab_size": 151936}
  config |= {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": {"mrope_section": [16, 24, 24]}}
  (path / "config.json").write_text(json.dumps(config | {"vision_config": {"out_hidden_size": 2048}}))
  return max(filled, SHARD), sum(2 * math.prod(shape) for shape in keys.values())


def high_water(pid):
  """Most memory that a process had since it runs its program, in bytes; 0 when it has ended. (The figure of `wait4` is
  at least what the parent had when it forked, and the process of the tests may be large.)"""
  with contextlib.suppress(OSError):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
  return 0


@pytest.mark.slow
@pytest.mark.parametrize("format", ["directory", "release"])
def test_memory(tmp_path, format):
  if shutil.disk_usage(tmp_path).free < 12 * GIB:
    pytest.skip("needs 12 GiB of disk")
  shard, size = make(tmp_path / "in")
  assert size >= 4 * GIB
  start = time.perf_counter()
  shutil.copytree(tmp_path / "in", tmp_path / "copy")
  copying = time.perf_counter() - start
  shutil.rmtree(tmp_path / "copy")
  words = [sys.executable, "-m", "blip3o_jax", "convert", "--from", tmp_path / "in", "--to", tmp_path / "out"]
  start = time.perf_counter()
  process = subprocess.Popen([*words, *(["--format", "safetensors"] if format == "release" else [])])
  peak = 0
  while process.poll() is None:
    peak = high_water(process.pid) or peak
    time.sleep(0.02)
  converting = time.perf_counter() - start
  assert process.returncode == 0
  # The times are told, not judged: those of one disk on one day differ fourfold.
  times = f"copied in {copying:.1f} s, converted in {converting:.1f} s"
  print(f"\n{format}: {size / GIB:.2f} GiB, {times}, peak {peak / GIB:.2f} GiB")
  assert peak < 1.5 * shard + GIB
