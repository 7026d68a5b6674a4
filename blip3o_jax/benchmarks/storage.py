"""`blip3o bench checkpoint|convert`: what goes to disk and comes back, beside a plain copy of as many bytes."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from blip3o_jax.benchmarks import Case, nbytes
from blip3o_jax.benchmarks.parts import Setup
from blip3o_jax.checkpoints.store import Store
from blip3o_jax.models import presets
from blip3o_jax.porting import model_dir
from blip3o_jax.porting.locate import convert_model
from blip3o_jax.training import optimizers, state
from blip3o_jax.training.defaults import default_config


def checkpoint(on: Setup) -> Iterator[Case]:
  """What trains, queries and DiT with their moments, saved until it is on disk and restored; and a file copied."""
  optimizer = optimizers.make_optimizer(default_config().optimizer)
  saved = state.create(on.weights("queries", "dit"), optimizer=optimizer, ema=False)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
  size = nbytes(saved)
  with tempfile.TemporaryDirectory() as folder, Store(Path(folder, "run"), keep=1) as store:
    steps = iter(range(1, 1 << 30))

    def save():
      store.save(next(steps), saved, {}, insist=True)

    yield _moving(f"checkpoint, save {size / 2**20:.0f} MiB", save, size)
    yield _moving("checkpoint, restore", lambda: store.restore(store.latest(), abstract)[0], size)
    yield _copying("checkpoint", Path(folder), size)


def convert(on: Setup) -> Iterator[Case]:
  """A model directory of the whole model to the release's layout and back to a directory; and a file copied."""
  with tempfile.TemporaryDirectory() as folder:
    first, release, second = (Path(folder, name) for name in ("first", "release", "second"))
    params = on.weights("backbone", "queries", "dit", "clip", "unet", "vae")
    size, preset = nbytes(params), "blip3o-4b"
    model_dir.write(first, preset=preset, overrides=presets.difference(presets.get(preset), on.cfg), params=params)
    del params
    to_release = lambda: convert_model(first, release, format="safetensors")
    yield _moving(f"convert, {size / 2**20:.0f} MiB to the release's layout", to_release, size)
    back = lambda: convert_model(release, second)
    yield _moving("convert, back to a model directory", back, size)
    yield _copying("convert", Path(folder), size)


def _moving(name: str, call: Callable, size: int) -> Case:
  return Case(name, call, count=size / 1e6, unit="MB")


def _copying(part: str, folder: Path, size: int) -> Case:
  """A file of `size` bytes copied, and waited for until it is on disk."""
  source, target = folder / "plain", folder / "copy"
  with open(source, "wb") as file:
    block = os.urandom(1 << 20)
    for start in range(0, size, len(block)):
      file.write(block[: size - start])

  def copy():
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
      os.fsync(file.fileno())

  return _moving(f"{part}, a plain copy of as many bytes", copy, size)


PARTS: dict[str, Callable[[Setup], Iterator[Case]]] = {"checkpoint": checkpoint, "convert": convert}
