"""`python sharded.py DEVICES WORKDIR JSON ...` trains a small model of the real kind once for each JSON of changes.

The whole miniature with every number small (tests/tiny.py) but wide enough that every mesh axis cuts something, on
pictures and prompts drawn by sample number: real objective, real trainer. With JAX_COORDINATOR_ADDRESS set it is one of
several processes.
"""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import tiny
import toy

from blip3o_jax.sharding import distributed
from blip3o_jax.training import trainer
from blip3o_jax.training.defaults import default_config

BATCH, LENGTH = 16, 8
# Two heads everywhere, so that `tensor` cuts them; two layers, so that stacks are stacks.
OVERRIDES = {
  "backbone": {**tiny.OVERRIDES["backbone"], "text": tiny.OVERRIDES["backbone"]["text"] | {"layers": 2, "kv_heads": 2}},
  "dit": tiny.OVERRIDES["dit"] | {"layers": 2, "kv_heads": 2},
  **{name: tiny.OVERRIDES[name] for name in ("clip", "unet", "vae", "text_tower", "queries", "image_size")},
}


def batches(config, architecture, part, start_step):
  """Row i of the stream is a function of i alone."""
  rows = config.batch_size // part[1]
  step = start_step
  while True:
    index = step * config.batch_size + part[0] * rows + np.arange(rows)
    draws = [np.random.default_rng((7, i)) for i in index]
    lengths = np.asarray([rng.integers(3, LENGTH + 1) for rng in draws])
    mask = np.arange(LENGTH) < lengths[:, None]
    tokens = np.stack([rng.integers(0, 600, LENGTH) for rng in draws])
    yield {
      "tokens": np.where(mask, tokens, 630).astype(np.int32),
      "token_mask": mask,
      "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, 3, LENGTH)),
      "pixels": np.stack([rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for rng in draws]),
    }
    time.sleep(config.data.get("sleep", 0.0))
    step += 1


def config(**changes):
  """The generation stage, float32, frozen parts at random."""
  config = default_config()
  config.update(steps=50, batch_size=BATCH, compute_dtype="float32", log_every=1, save_every=1000)
  config.model.overrides = OVERRIDES
  config.optimizer.learning_rate = 1e-3
  config.schedule = {"name": "constant", "min_ratio": 0.0, "warmup_steps": 5, "warmup_ratio": 0.0}
  return toy.changed(config, changes)


def run(workdir, *changes, devices=1, port=None, index=0, processes=1, **kwargs):
  """Start this file as a process; `changes` are dicts, each with a "name" under which WORKDIR gets its run."""
  env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
  env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
  if port:
    env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    env |= {"JAX_PROCESS_ID": str(index)}
  command = [sys.executable, __file__, str(devices), str(workdir), *map(json.dumps, changes)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, env=env, **(pipes | kwargs))


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
  jax.config.update("jax_default_matmul_precision", "highest")
  distributed.start()
  trainer.open_loader, trainer.export = toy.opening(batches), lambda *args: None
  with toy.statuses():
    for changes in map(json.loads, sys.argv[3:]):
      trainer.train(config(**{k: v for k, v in changes.items() if k != "name"}), f"{sys.argv[2]}/{changes['name']}")
