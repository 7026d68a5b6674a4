"""The trainer end to end on a toy: what it learns, what it leaves, and that it goes on as if nothing had happened."""

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from buckets import bucket
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from blip3o_jax import objectives
from blip3o_jax.errors import Preempted, UserError
from blip3o_jax.models import presets
from blip3o_jax.models.flops import Pass
from blip3o_jax.training import profiling, throughput, trainer


@pytest.fixture(autouse=True)
def toy_world(monkeypatch):
  toy.install(monkeypatch.setattr)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
  """An uninterrupted run: {step: loss}, its parameters, its directory."""
  workdir = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as patch:
    toy.install(patch.setattr)
    trainer.train(toy.config(ema_decay=0.9), workdir)
  return toy.losses(workdir), dict(np.load(workdir / "model/params.npz")), workdir


def stop_at(monkeypatch, step):
  """A real SIGTERM to this very process when the loader has been asked for batch `step`."""

  def loader(config, architecture, part, start_step):
    for index, batch in enumerate(toy.batches(config, architecture, part, start_step)):
      if start_step + index == step:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  monkeypatch.setattr(trainer, "open_loader", toy.opening(loader))


def test_it_learns_and_leaves_a_model(whole, tmp_path, capsys):
  losses, params, _ = whole
  assert list(losses) == list(range(1, 31)) and losses[30] < 0.7 * losses[1]
  assert set(params) == {"enc/kernel", "enc/bias", "head/kernel", "head/bias"}


def test_resume_is_exact_to_the_bit(whole, tmp_path, monkeypatch):
  before = signal.getsignal(signal.SIGTERM)
  stop_at(monkeypatch, 13)
  with pytest.raises(Preempted, match="run the same command again"):
    trainer.train(toy.config(ema_decay=0.9), tmp_path)
  assert signal.getsignal(signal.SIGTERM) is before
  cut = toy.losses(tmp_path)
  assert 11 <= max(cut) <= 14 and not (tmp_path / "model").exists()

  stop_at(monkeypatch, -1)
  result = trainer.train(toy.config(ema_decay=0.9, log_every=1), tmp_path)
  assert toy.losses(tmp_path) == whole[0]
  ours = dict(np.load(result.model_dir / "params.npz"))
  assert all(np.array_equal(ours[name], whole[1][name]) for name in whole[1])


def test_on_an_accelerator_compiled_programs_are_kept(tmp_path, monkeypatch):
  """The CPU is called one here: what a pre-empted run goes on with is what it had compiled."""
  settings = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0}
  before = {name: getattr(jax.config, name) for name in settings}
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  steps = lambda: sorted((file.name, file.stat().st_size) for file in (tmp_path / "compiled").glob("jit_step-*-cache"))
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    with monkeypatch.context() as patch, pytest.raises(Preempted):
      stop_at(patch, 3)
      trainer.train(toy.config(), tmp_path)
    kept = steps()
    assert len(kept) == 1
    trainer.train(toy.config(), tmp_path)
    assert steps() == kept
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_loader_that_dies_of_the_same_signal_loses_nothing(whole, tmp_path, monkeypatch):
  """Ctrl-C reaches a loader's worker processes as well."""

  taken, add = threading.Event(), trainer.metrics.MetricLog.add

  def note(log, step, *rest):
    add(log, step, *rest)
    if step == 13:
      taken.set()

  def loader(config, architecture, part, start_step):
    for index, batch in enumerate(toy.batches(config, architecture, part, start_step)):
      if start_step + index == 13:
        assert taken.wait(60)  # the loader runs ahead of the steps
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        raise RuntimeError("a worker process is gone")
      yield batch

  with monkeypatch.context() as patch, pytest.raises(Preempted, match="after step 13"):
    patch.setattr(trainer, "open_loader", toy.opening(loader))
    patch.setattr(trainer.metrics.MetricLog, "add", note)
    trainer.train(toy.config(ema_decay=0.9), tmp_path)
  trainer.train(toy.config(ema_decay=0.9), tmp_path)
  assert toy.losses(tmp_path) == whole[0]


def test_a_crash_goes_back_to_the_last_save(whole, tmp_path, monkeypatch):
  def crash(*args):
    for index, batch in enumerate(toy.batches(*args)):
      if index == 17:
        raise OSError("the disk with the data is gone")
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(trainer, "open_loader", toy.opening(crash))
    with pytest.raises(OSError, match="is gone"):
      trainer.train(toy.config(ema_decay=0.9), tmp_path)
  assert max(toy.losses(tmp_path)) > 10
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 18, "lo')  # as a kill leaves it
  trainer.train(toy.config(ema_decay=0.9), tmp_path)
  assert toy.losses(tmp_path) == whole[0]


def test_what_is_counted_of_the_data_is_logged(whole):
  """Two of the toy's sixteen rows say that something was cut."""
  lines = trainer.metrics.read(whole[2] / "metrics.jsonl")
  assert [(line["rows_cut"], line["rows_replaced"]) for line in lines] == [(2 * line["step"], 0) for line in lines]


def test_finished_run_returns_at_once(tmp_path, monkeypatch, capsys):
  first = trainer.train(toy.config(steps=3), tmp_path)
  monkeypatch.setattr(trainer, "build", None)
  again = trainer.train(toy.config(steps=3), tmp_path)
  assert again == first and "finished" in capsys.readouterr().out
  with pytest.raises(UserError, match="steps was 3, is 4"):
    trainer.train(toy.config(steps=4), tmp_path)


def test_a_kill_between_last_save_and_export(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(trainer, "export", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      trainer.train(toy.config(steps=3), tmp_path)
  result = trainer.train(toy.config(steps=3), tmp_path)
  assert (result.model_dir / "model.json").exists() and result.steps == 3 and result.metrics["step"] == 3


def test_frozen_stays_and_is_not_saved_again(tmp_path):
  config = toy.config(steps=5)
  trainer.train(config, tmp_path)
  program = trainer.build(trainer.complete(config), trainer.make_mesh({"data": 1}, batch_size=16))
  fresh = trainer.initial_params(trainer.complete(config), program, program.params, lambda *_: None)
  final = dict(np.load(tmp_path / "model/params.npz"))
  np.testing.assert_array_equal(final["enc/kernel"], fresh["enc"]["kernel"])
  assert np.abs(final["head/kernel"] - fresh["head"]["kernel"]).max() > 1e-3
  names = (tmp_path / "checkpoints/5/state/_METADATA").read_text()
  assert "head" in names and "enc" not in names


def test_dtypes_of_master_and_frozen(tmp_path):
  config = trainer.complete(toy.config(compute_dtype="bfloat16", ema_decay=0.5))
  program = trainer.build(config, trainer.make_mesh({"data": 1}, batch_size=16))
  assert {x.dtype.name for x in jax.tree.leaves(program.frozen)} == {"bfloat16"}
  assert {x.dtype.name for x in jax.tree.leaves((program.state.trained, program.state.ema))} == {"float32"}


def test_accumulation_gives_the_same_update(tmp_path):
  """Weights differ by row, so dividing every part by its own weight would be wrong."""
  quiet = {"noise": 0.0}
  trainer.train(toy.config(steps=4, objective_args=quiet), tmp_path / "one")
  trainer.train(toy.config(steps=4, objective_args=quiet, accumulate=4), tmp_path / "four")
  one, four = (dict(np.load(tmp_path / name / "model/params.npz")) for name in ("one", "four"))
  for name in one:
    np.testing.assert_allclose(one[name], four[name], atol=2e-6)
  np.testing.assert_allclose(
    list(toy.losses(tmp_path / "one").values()), list(toy.losses(tmp_path / "four").values()), rtol=1e-5
  )
  norms = [[x["grad_norm"] for x in trainer.metrics.read(tmp_path / n / "metrics.jsonl")] for n in ("one", "four")]
  np.testing.assert_allclose(*norms, rtol=1e-5)


def test_non_finite_updates_are_skipped(tmp_path):
  config = toy.config(steps=6, data={"poison": [3]}, objective_args={"poison": True})
  trainer.train(config, tmp_path)
  lines = trainer.metrics.read(tmp_path / "metrics.jsonl")
  assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1]
  assert not np.isfinite(lines[3]["loss"]) and np.isfinite(lines[4]["loss"])
  # The rate goes on over the skipped step, as torch's schedulers do.
  clean = toy.config(steps=6)
  trainer.train(clean, tmp_path / "clean")
  rates = [line["learning_rate"] for line in trainer.metrics.read(tmp_path / "clean/metrics.jsonl")]
  assert rates == [line["learning_rate"] for line in lines]


def test_gives_up_after_bad_steps_in_a_row(tmp_path):
  config = toy.config(data={"poison": "all"}, objective_args={"poison": True}, max_bad_steps=4)
  with pytest.raises(UserError, match="4 steps in a row"):
    trainer.train(config, tmp_path)


def test_ema_is_exported(tmp_path):
  trainer.train(toy.config(steps=3, ema_decay=0.99), tmp_path / "ema")
  trainer.train(toy.config(steps=3), tmp_path / "plain")
  ema, plain = (dict(np.load(tmp_path / name / "model/params.npz")) for name in ("ema", "plain"))
  assert toy.losses(tmp_path / "ema") == toy.losses(tmp_path / "plain")
  assert not np.array_equal(ema["head/kernel"], plain["head/kernel"])
  np.testing.assert_allclose(ema["head/kernel"], plain["head/kernel"], atol=0.05)


def test_every_step_draws_its_own_noise(tmp_path, monkeypatch):
  def same_batch(*args):
    batch = next(toy.batches(*args))
    while True:
      yield batch

  monkeypatch.setattr(trainer, "open_loader", toy.opening(same_batch))
  trainer.train(toy.config(steps=3, optimizer={"learning_rate": 0.0}), tmp_path)
  assert len(set(toy.losses(tmp_path).values())) == 3


def test_the_step_compiles_once(tmp_path, caplog):
  with jax.log_compiles():
    trainer.train(toy.config(steps=5), tmp_path)
  compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(step)")]
  assert len(compiled) == 1, compiled


@pytest.mark.parametrize("changes, words", [
  ({"trainable": ("dit/",)}, "dit/"),
  ({"mesh": {"data": 3}}, "mesh"),
  ({"optimizer": {"name": "sgd"}}, "sgd"),
  ({"init_from": "/nowhere"}, "/nowhere"),
  ({"export": "zip"}, "zip"),
  ({"components": ("vea",)}, "'vea' is no part of the model"),
])  # fmt: skip
def test_bad_config_leaves_nothing(tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    trainer.train(toy.config(**changes), tmp_path / "run")
  assert not (tmp_path / "run/checkpoints").exists() or not os.listdir(tmp_path / "run/checkpoints")


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match=r"file/run cannot be written \(.*Not a directory"):
    trainer.train(toy.config(), tmp_path / "file/run")


def test_progress_line_and_overview(tmp_path, capsys):
  trainer.train(toy.config(steps=4, log_every=2), tmp_path)
  out = capsys.readouterr().out
  lines = [line for line in out.splitlines() if line.startswith("step ")]
  assert [line.split()[1] for line in lines] == ["1/4", "2/4", "4/4"]
  assert all(word in lines[-1] for word in ("loss", "images/s", "s/step", "ETA", "data wait", "goodput", "update_norm"))
  assert "136 trained" in out and "144 frozen" in out and "random" in out
  assert list(toy.losses(tmp_path)) == [1, 2, 4]


def test_where_the_time_goes(tmp_path, monkeypatch):
  """A slow loader, a slow save, and a pause between two starts."""
  save = trainer.Store.save

  def slow(store, step, *args, **kwargs):
    time.sleep(0.3)
    return save(store, step, *args, **kwargs)

  monkeypatch.setattr(trainer.Store, "save", slow)
  stop_at(monkeypatch, 14)
  config = lambda: toy.config(steps=20, log_every=10, data={"sleep": 0.03})
  with pytest.raises(Preempted):
    trainer.train(config(), tmp_path)
  time.sleep(1)
  monkeypatch.setattr(trainer, "open_loader", toy.opening(toy.batches))
  trainer.train(config(), tmp_path)
  lines = {line["step"]: line for line in trainer.metrics.read(tmp_path / "metrics.jsonl")}
  assert 0.02 <= lines[10]["step_seconds"] < 0.1 and lines[10]["data_wait"] > 0.6 and "mfu" not in lines[10]
  assert lines[10]["images_per_s"] == pytest.approx(16 / lines[10]["step_seconds"], rel=1e-3)
  assert lines[10]["images_per_s"] == lines[10]["images_per_s_per_chip"]
  assert lines[10]["save_seconds"] == 0
  wall = time.time() - float((tmp_path / "began.txt").read_text())
  assert lines[20]["goodput"] * wall < 0.4 * 20 * 0.03  # most of what the steps took was waiting
  assert 0 < lines[20]["goodput"]


def test_utilisation():
  """6 TFLOP in 2 s on two chips of 197 TFLOP/s each."""
  chips = [types.SimpleNamespace(device_kind="TPU v5 lite")] * 2
  assert throughput.utilisation(6e12, 2.0, chips) == pytest.approx(6 / (2 * 2 * 197))
  assert throughput.utilisation(6e12, 2.0, jax.devices()) is None
  assert throughput.utilisation(None, 2.0, chips) is None


def test_flops_of_a_step():
  """Forward, and twice as much again where gradients of inputs and weights are taken (models.flops)."""
  objective = types.SimpleNamespace(
    passes=lambda cfg, shapes, args: [Pass("a", shapes["x"][1], gradient=False), Pass("b", 10.0), Pass("c", args["n"])]
  )
  count = throughput.step_flops(objective, {"n": 100.0}, None, {"c"})
  assert count({"x": np.zeros((4, 7))}) == 4 * (7 + 2 * 10 + 3 * 100)
  assert throughput.step_flops(types.SimpleNamespace(), {}, None, {"c"})({"x": np.zeros(3)}) is None


def test_flops_of_a_joint_step():
  """Those of its two parts, of any numbers of rows."""
  cfg = presets.get("micro")
  rows = lambda b, length: {"tokens": np.zeros((b, length)), "pixels": np.zeros((b, 64, 64, 3))}
  batch = {"understanding": rows(3, 20), "generation": rows(5, 12)}
  trained = {"backbone", "queries", "dit"}
  flops = lambda name, batch, **args: throughput.step_flops(objectives.get(name), args, cfg, trained)(batch)
  answers = flops("understanding", batch["understanding"])
  pictures = flops("generation", batch["generation"], prefix_pass=False)
  assert flops("joint", batch) == pytest.approx(answers + pictures, rel=1e-12) and min(answers, pictures) > 0


def test_profile(tmp_path):
  trainer.train(toy.config(steps=6, profile=2), tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profile_reaches_a_bucket_and_one_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
  (tmp_path / "tmp").mkdir()

  def trace(directory):
    with profiling.Profile(directory, 1, 1) as profile:
      profile.before(1)
      profile.after(1, jax.numpy.ones(3) + 1)

  with bucket() as files:
    trace(epath.Path("gs://somewhere/profile"))
    assert any(name.endswith(".xplane.pb") for name in files.store)
  (tmp_path / "profile").write_text("in the way")
  trace(epath.Path(tmp_path / "profile"))
  assert f"WARNING: no profile, {tmp_path / 'profile'} cannot be written" in capsys.readouterr().out
  assert not list((tmp_path / "tmp").iterdir())


# ---- saves that fail


def test_a_save_that_fails_is_told_and_tried_again(whole, tmp_path, monkeypatch, capsys):
  """The directory of the checkpoints is gone while steps 10 to 19 run."""

  def loader(config, architecture, part, start_step):
    for index, batch in enumerate(toy.batches(config, architecture, part, start_step)):
      if index == 5:
        (tmp_path / "checkpoints").rename(tmp_path / "away")
        (tmp_path / "checkpoints").write_text("")
      if index == 15:
        (tmp_path / "checkpoints").unlink()
      if index == 23:
        raise OSError("and then the data")
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(trainer, "open_loader", toy.opening(loader))
    with pytest.raises(OSError, match="and then the data"):
      trainer.train(toy.config(ema_decay=0.9), tmp_path)
  told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: step")]
  assert len(told) == 1 and "step 10 was not saved" in told[0] and "training goes on" in told[0]
  assert os.listdir(tmp_path / "checkpoints") == ["20"]
  trainer.train(toy.config(ema_decay=0.9), tmp_path)
  assert toy.losses(tmp_path) == whole[0]


def test_a_last_save_that_fails_is_no_success(tmp_path, monkeypatch):
  """Neither at the end nor when pre-empted: what is not on disk is not reported as if it were."""

  def loader(config, architecture, part, start_step):
    for index, batch in enumerate(toy.batches(config, architecture, part, start_step)):
      if index == 5:
        (tmp_path / "checkpoints").rename(tmp_path / "away")
        (tmp_path / "checkpoints").write_text("")
        if config.keep == 2:
          os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  monkeypatch.setattr(trainer, "open_loader", toy.opening(loader))
  for keep in (1, 2):
    with pytest.raises(UserError, match=r"step \d+ could not be saved .*nothing is saved yet"):
      trainer.train(toy.config(steps=8, keep=keep), tmp_path)
    assert not (tmp_path / "model").exists()
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "away").rename(tmp_path / "checkpoints")


def test_bad_steps_do_not_overwrite_a_good_checkpoint(tmp_path, capsys):
  """And the run goes on from there with a lower rate, which no other field may be told of."""
  poison = {"poison": list(range(14, 40))}
  config = lambda **more: toy.config(data=poison, objective_args={"poison": True}, save_every=5, **more)
  with pytest.raises(UserError, match="8 steps in a row, steps 15 to 22; the last good checkpoint is kept"):
    trainer.train(config(max_bad_steps=8), tmp_path)
  assert os.listdir(tmp_path / "checkpoints") == ["10"]
  assert "step 15 is not saved: the last 1 steps were not finite" in capsys.readouterr().out
  with pytest.raises(UserError, match="steps 15 to 20"):
    trainer.train(config(max_bad_steps=6, optimizer={"learning_rate": 1e-4}), tmp_path)
  out = capsys.readouterr().out
  assert "another config: optimizer.learning_rate was 0.01, is 0.0001" in out and "goes on after step 10" in out


# ---- processes that are really killed


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_killed_process_goes_on_exactly(whole, tmp_path, number, status):
  args = json.dumps({"ema_decay": 0.9, "data": {"sleep": 0.02}})
  expected = tmp_path / "whole"
  assert toy.run(expected, args).wait() == 0
  workdir = tmp_path / "cut"
  for step in (4, 11, 23):
    process = toy.run(workdir, args)
    toy.wait_for(workdir, step, process)
    process.send_signal(number)
    assert process.wait() == status
  assert toy.run(workdir, args).wait() == 0
  assert toy.losses(workdir) == toy.losses(expected)
  a, b = (np.load(d / "model/params.npz") for d in (workdir, expected))
  assert all(np.array_equal(a[name], b[name]) for name in a.files)


@pytest.mark.slow
def test_kill_nine_at_random_moments(tmp_path):
  """A save every step, so that many of the twenty kills fall into one. Losses and samples are the same to the bit."""
  args = json.dumps({"save_every": 1, "steps": 400, "data": {"sleep": 0.01}})
  assert toy.run(tmp_path / "whole", json.dumps({"steps": 400})).wait() == 0
  rng, torn = np.random.default_rng(0), 0
  for _ in range(20):
    process = toy.run(tmp_path / "cut", args)
    toy.wait_for(tmp_path / "cut", 1 + len(toy.losses(tmp_path / "cut")), process)
    time.sleep(rng.uniform(0, 0.4))
    process.kill()
    assert process.wait() == -9
    torn += any("tmp" in path.name for path in (tmp_path / "cut/checkpoints").iterdir())
  assert torn >= 3, "the kills did not fall into saves"
  assert toy.run(tmp_path / "cut", args).wait() == 0
  assert toy.losses(tmp_path / "cut") == toy.losses(tmp_path / "whole")
  ids = [[line["ids"] for line in trainer.metrics.read(tmp_path / run / "metrics.jsonl")] for run in ("cut", "whole")]
  assert ids[0] == ids[1]


@pytest.mark.slow
def test_a_disk_that_fills_up_and_is_cleared(tmp_path):
  """A real file system of 2 MiB where one may be mounted."""
  small = tmp_path / "small"
  small.mkdir()
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], capture_output=True).returncode:
    pytest.skip("may not mount a file system")
  try:
    args = json.dumps({"steps": 200, "save_every": 20, "data": {"sleep": 0.02}})
    process = toy.run(small / "run", args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    toy.wait_for(small / "run", 25, process)
    filler = small / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
      while file.write(bytes(4096)):
        pass
    time.sleep(2)
    filler.unlink()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "was not saved (No space left on device)" in out, out
    assert "metrics.jsonl cannot be written (No space left on device)" in out
    assert list(toy.losses(small / "run")) == list(range(1, 201))
    assert os.listdir(small / "run/checkpoints") == ["200"]
  finally:
    subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.slow
def test_soak(tmp_path):
  """Thousands of steps with forced restarts: memory and open files stay as they are, old checkpoints go."""

  def watch(process, until):
    """(resident MiB, open files) about every 50 steps until `until` is logged or the process ends."""
    seen, last = [], 0
    while process.poll() is None and last < until:
      lines = trainer.metrics.read(tmp_path / "run/metrics.jsonl")
      if lines and lines[-1]["step"] >= last + 50:
        last = lines[-1]["step"]
        status = Path(f"/proc/{process.pid}/status").read_text()
        files = len(os.listdir(f"/proc/{process.pid}/fd"))
        seen.append((int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, files))
      time.sleep(0.02)
    return seen

  args = json.dumps({"steps": 5000, "save_every": 20, "log_every": 10, "keep": 3, "ema_decay": 0.9})
  for until, number, status in [(400, signal.SIGKILL, -9), (900, signal.SIGTERM, 75), (1400, signal.SIGKILL, -9)]:
    process = toy.run(tmp_path / "run", args)
    watch(process, until)
    process.send_signal(number)
    assert process.wait() == status
  process = toy.run(tmp_path / "run", args)
  seen = watch(process, 10_000)
  assert process.wait() == 0
  memory, files = np.asarray(seen).T
  third = len(seen) // 3
  print(f"{len(seen)} looks: {memory[third]:.0f} MiB then, {memory[-1]:.0f} MiB at last; {files[third:].max()} files")
  assert len(seen) > 30
  assert np.median(memory[-third:]) < np.median(memory[third : 2 * third]) + 8
  assert files[-third:].max() <= files[third : 2 * third].max() + 4
  assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["4960", "4980", "5000"]
  lines = trainer.metrics.read(tmp_path / "run/metrics.jsonl")
  assert [line["step"] for line in lines] == [1, *range(10, 5001, 10)]
