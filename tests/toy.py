"""A small real world for the trainer: a two-layer network learns a linear map, through real Orbax and real signals.

`python toy.py WORKDIR field=value ...` trains in a process of its own that a test may kill.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import Preempted, UserError
from blip3o_jax.nn.linear import Dense
from blip3o_jax.sharding import distributed
from blip3o_jax.training import trainer
from blip3o_jax.training.defaults import default_config

WIDTH = 16


class Toy(nn.Module):
  """Two components: `enc` (frozen in most tests) and `head`."""

  cfg: object = None
  dtype: object = jnp.float32

  def setup(self):
    self.enc = Dense(WIDTH, axes=("embed", "mlp"), dtype=self.dtype)
    self.head = Dense(8, axes=("mlp", "embed"), dtype=self.dtype)

  def __call__(self, x):
    h = nn.with_logical_constraint(jnp.tanh(self.enc(x)), ("batch", "act_mlp"))
    return self.head(h)

  def init_components(self, rng, components):
    params = self.init(rng, jnp.zeros((1, 8)))["params"]
    return {name: params[name] for name in components}


def loss(params, batch, rng, *, model, cfg):
  """Squared error with noise on the input, weighed by row; `poison` makes the loss of chosen batches infinite."""
  x = batch["x"] + cfg.get("noise", 0.01) * jax.random.normal(rng, batch["x"].shape)
  error = jnp.mean(jnp.square(model.apply({"params": params}, x) - batch["y"]), axis=-1)
  total = jnp.sum(error * batch["weight"])
  if cfg.get("poison"):
    total = total * jnp.where(jnp.any(batch["index"] == batch["poison"]), jnp.inf, 1.0)
  metrics = {"abs": jnp.sum(jnp.sqrt(error) * batch["weight"])}
  # Which samples these are: integers whose sum float32 holds exactly, whatever the order.
  return total, jnp.sum(batch["weight"]), metrics | {"ids": jnp.sum(batch["id"].astype(jnp.float32))}


def make_loader(data, *, batch_size, seed, start_step, process_index=0, process_count=1):
  """Row i of the stream is a function of (seed, i)."""
  true = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
  rows = batch_size // process_count
  step = start_step
  while True:
    index = step * batch_size + process_index * rows + np.arange(rows)
    x = np.stack([np.random.default_rng((seed, i)).normal(size=8) for i in index]).astype(np.float32)
    batch = {"x": x, "y": np.tanh(x @ true), "weight": (index % 3 + 1).astype(np.float32), "caption": ["a"] * rows}
    batch["id"] = (index * 40503 % 65536).astype(np.int32)
    batch["cut"] = (index % 8 == 0).astype(np.int32)
    if "poison" in data:
      poison = data["poison"]
      batch["index"] = np.full(rows, step, np.int32)
      batch["poison"] = np.full(rows, step if poison == "all" or step in poison else -1, np.int32)
    time.sleep(data.get("sleep", 0.0))
    yield batch
    step += 1


def batches(config, architecture, part, start_step):
  """From `start_step` on, one part."""
  place = {"process_index": part[0], "process_count": part[1]}
  return make_loader(
    config.data.to_dict(), batch_size=config.batch_size, seed=config.seed, start_step=start_step, **place
  )


def opening(batches):
  """In the place of feed.open_loader."""
  return lambda *args: functools.partial(batches, *args)


def export(config, program, params, directory, facts):
  """Stand-in for a model directory, which needs real components."""
  flat = {"/".join(k): distributed.whole(v) for k, v in trainer.state.flatten_dict(params).items()}
  if jax.process_index():
    return
  directory.mkdir(parents=True)
  np.savez(directory / "params.npz", **flat)
  (directory / "model.json").write_text(json.dumps(facts))


def install(patch=setattr):
  """Put the toy in the place of objectives, presets, the model and the loader (`patch` = monkeypatch.setattr)."""
  objective = types.SimpleNamespace(COMPONENTS=("enc", "head"), loss=loss)
  patch(trainer, "objectives", types.SimpleNamespace(get=lambda name: objective, check=lambda *_: None))
  patch(trainer, "presets", types.SimpleNamespace(get=lambda name, overrides: None))
  patch(trainer, "Blip3o", Toy)
  patch(trainer, "open_loader", opening(batches))
  patch(trainer, "export", export)


def config(**changes):
  """Thirty quick steps."""
  config = default_config()
  config.update(steps=30, batch_size=16, compute_dtype="float32", trainable=("head/",), log_every=1, save_every=10)
  config.optimizer.learning_rate = 1e-2
  config.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
  return changed(config, changes)


def changed(config, changes):
  """`config` with other values; groups are given as dicts."""
  with config.ignore_type():
    for key, value in changes.items():
      if isinstance(value, dict):
        config[key].update(value)
      else:
        config[key] = value
  return config


def losses(workdir) -> dict[int, float]:
  """{step: loss} of metrics.jsonl, failing on a step that is there twice."""
  lines = trainer.metrics.read(Path(workdir) / "metrics.jsonl")
  assert len({line["step"] for line in lines}) == len(lines), "a step was logged twice"
  return {line["step"]: line["loss"] for line in lines}


def run(workdir, *args, env=None, **kwargs):
  """Start this file as a process of its own."""
  env = env or os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
  return subprocess.Popen([sys.executable, __file__, str(workdir), *args], env=env, **kwargs)


def wait_for(workdir, step, process):
  """Until `process` has logged `step`."""
  deadline = time.time() + 120
  while time.time() < deadline:
    assert process.poll() is None, "the run ended before it could be stopped"
    if any(line["step"] >= step for line in trainer.metrics.read(Path(workdir) / "metrics.jsonl")):
      return
    time.sleep(0.01)
  raise TimeoutError


@contextlib.contextmanager
def statuses():
  """Errors end the process as on the command line."""
  try:
    yield
  except Preempted as error:
    print(error, flush=True)
    sys.exit(75)
  except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  install()
  jax.config.update("jax_default_matmul_precision", "highest")
  distributed.start()
  with statuses():
    trainer.train(config(**json.loads(sys.argv[2])), sys.argv[1])
