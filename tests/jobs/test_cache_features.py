"""Cached features: what is stored, going on, bad pictures, several processes, and what is refused."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from helpers import relative_error

from blip3o_jax.data import pipeline, shapes_corpus, tars
from blip3o_jax.data.features import FeatureSource
from blip3o_jax.data.outputs import encode_png
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.jobs import cache_features
from blip3o_jax.porting import model_dir

N = 11
BAD = 4
OPTIONS = {"batch_size": 4, "shard_size": 3, "threads": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(jax, "jit", tiny.quick_jit)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """A tiny model, and eleven random pictures with captions, of which one is no picture."""
  out = tmp_path_factory.mktemp("world")
  sizes = {"contrastive": 0, "pretrain": 12, "instruct": 0, "understanding": 0, "text_only": 0, "held_out": 0}
  tokenizer = shapes_corpus.make_shapes(out / "shapes", **sizes) / "tokenizer"
  parts = {name: tiny.params()[name] for name in ("queries", "clip")}
  model_dir.write(out / "model", preset="micro", overrides=tiny.OVERRIDES, params=parts, tokenizer_dir=tokenizer)
  members = []
  for i, pixels in enumerate(tiny.pixels(N)):
    content = b"no" if i == BAD else encode_png(pixels)
    members += [(f"{i:03d}.png", content), (f"{i:03d}.txt", f"a red circle {i}".encode())]
  tars.write(out / "data/0.tar", members)
  return out


def cache(world, out, **options):
  return cache_features.run(str(world / "model"), str(world / "data"), out, **OPTIONS | options)


@pytest.fixture(scope="module")
def cached(world, tmp_path_factory):
  out = tmp_path_factory.mktemp("cache") / "features"
  cache(world, out, dtype="float32")
  return out


def test_features_captions_and_places_are_those_of_the_pictures(world, cached):
  source, pictures = FeatureSource(cached), open_source(world / "data")
  assert len(source) == len(pictures) == N
  want = tiny.quick_jit(lambda p, x: tiny.model().apply({"params": p}, x, method="clip_features"))(
    {"clip": tiny.params()["clip"]}, tiny.pixels(N)
  )
  for i in set(range(N)) - {BAD}:
    assert relative_error(source[i]["features"], want[i]) < 1e-5
    assert source[i]["text"] == pictures[i]["text"] == f"a red circle {i}"
  with pytest.raises(UserError, match=f"sample {BAD}: .*004: not an image"):
    source[BAD]


def test_bfloat16_is_rounding_and_half_the_size(world, cached, tmp_path):
  cache(world, tmp_path / "half")
  for i in set(range(N)) - {BAD}:
    half, whole = FeatureSource(tmp_path / "half")[i]["features"], FeatureSource(cached)[i]["features"]
    assert half.dtype.name == "bfloat16" and 2 * half.nbytes == whole.nbytes
    assert relative_error(half, whole) < 0.03  # bfloat16 arithmetic in the encoder, too


def test_training_sees_the_same_samples_in_the_same_order(world, cached):
  """The bad one is replaced by the same other sample."""
  tokenizer = load_tokenizer(world / "model/tokenizer")

  def batches(**data):
    loader = pipeline.make_loader({"max_length": 48, **data}, batch_size=4, seed=3, tokenizer=tokenizer)
    return [next(loader) for _ in range(6)]

  ours = batches(task="features", path=str(cached))
  plain = batches(task="generation", path=str(world / "data"), image_size=16)
  for a, b in zip(ours, plain, strict=True):
    for key in ("tokens", "token_mask", "positions"):
      np.testing.assert_array_equal(a[key], b[key])
    assert a["features"].shape == (4, 4, 16) and "pixels" not in a


def test_goes_on_and_tells(world, cached, tmp_path, capsys):
  """Finished shards are left alone, what a kill left over is removed, the missing shard becomes the same."""
  out = tmp_path / "features"
  shutil.copytree(cached, out)
  shard = out / "features-00001-of-00004.array_record"
  shard.rename(out / f".{shard.name}.123.tmp")
  before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix != ".tmp"}
  with pytest.raises(UserError, match="1 of 4 shards are missing; run the same"):
    FeatureSource(out)
  report = cache(world, out, dtype="float32")
  assert (report.pictures, report.bad) == (3, 1)
  told = capsys.readouterr().out
  assert (
    "3 of 4 shards are there" in told and "bad: " in told and "3/3 pictures" in told and "ETA 0:00:00, 1 bad" in told
  )
  assert {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path != shard} == before
  for i in (3, 5):
    assert relative_error(FeatureSource(out)[i]["features"], FeatureSource(cached)[i]["features"]) < 1e-5
  assert cache(world, out, dtype="float32").pictures == 0


def test_refusals(world, cached, tmp_path):
  with pytest.raises(UserError, match="other features .*dtype was 'float32', is 'bfloat16'"):
    cache(world, cached)
  with pytest.raises(UserError, match="resize was 'crop', is 'squash'"):
    cache(world, cached, dtype="float32", resize="squash")
  with pytest.raises(UserError, match="mount the bucket"):
    cache(world, "gs://bucket/features")
  model_dir.write(
    tmp_path / "m", preset="micro", overrides=tiny.OVERRIDES, params={"queries": tiny.params()["queries"]}
  )
  with pytest.raises(UserError, match="has no clip"):
    cache_features.run(str(tmp_path / "m"), str(world / "data"), tmp_path / "out")
  with pytest.raises(UserError, match="does not fit 1 devices"):
    cache(world, tmp_path / "out", fsdp=2)
  assert not (tmp_path / "out").exists()
  for task, path, words in [
    ("generation", cached, "holds features"),
    ("features", world / "data", "no cached features"),
  ]:
    with pytest.raises(UserError, match=words):
      pipeline.make_loader({"task": task, "path": str(path)}, batch_size=1, seed=0, tokenizer=object())
  (tmp_path / "clip_features.json").write_text("{")
  with pytest.raises(UserError, match="is damaged"):
    FeatureSource(tmp_path)


def command(world, out, **env):
  words = ["data", "cache-features", "--model", world / "model", "--data", world / "data", "--out", out]
  words += ["--dtype", "float32", "--batch-size", "4", "--shard-size", "3"]
  env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | env
  return subprocess.Popen(
    [sys.executable, "-m", "blip3o_jax", *map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )


def assert_equal(out, cached):
  assert json.loads((out / "clip_features.json").read_text()) == json.loads((cached / "clip_features.json").read_text())
  for i in set(range(N)) - {BAD}:
    assert relative_error(FeatureSource(out)[i]["features"], FeatureSource(cached)[i]["features"]) < 1e-5


@pytest.mark.slow
def test_kill_nine_leaves_no_half_shard(world, cached, tmp_path):
  """Killed at some moment of every attempt; each goes on, and what is there is whole."""
  out = tmp_path / "features"
  attempts = 0
  while attempts < 40:
    attempts += 1
    process = command(world, out)
    deadline, there = time.time() + 60, len(list(out.glob("features-*")))
    while process.poll() is None and len(list(out.glob("features-*"))) == there and time.time() < deadline:
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
      break
  assert attempts > 2 and process.returncode == 0
  assert_equal(out, cached)


@pytest.mark.slow
def test_two_processes_share_the_shards(world, cached, tmp_path):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  pods = [
    command(
      world,
      tmp_path / "features",
      JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(i),
    )
    for i in (0, 1)
  ]
  outs = [pod.communicate(timeout=120)[0].decode() for pod in pods]
  assert [pod.returncode for pod in pods] == [0, 0], outs
  assert all("0 of 2 shards are there already" in out for out in outs)
  assert_equal(tmp_path / "features", cached)
