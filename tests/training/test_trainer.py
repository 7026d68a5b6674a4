"""The trainer end to end on a toy: what it learns, what it leaves, and that it goes on as if nothing had happened."""

import json
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
import toy

from blip3o_jax.errors import Preempted, UserError
from blip3o_jax.training import trainer


@pytest.fixture(autouse=True)
def toy_world(monkeypatch):
  toy.install(monkeypatch.setattr)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
  """An uninterrupted run: {step: loss}, and its parameters."""
  workdir = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as patch:
    toy.install(patch.setattr)
    trainer.train(toy.config(ema_decay=0.9), workdir)
  return toy.losses(workdir), dict(np.load(workdir / "model/params.npz"))


def stop_at(monkeypatch, step):
  """A real SIGTERM to this very process when the loader has been asked for batch `step`."""

  def loader(config, architecture, start_step):
    for index, batch in enumerate(toy.open_loader(config, architecture, start_step)):
      if start_step + index == step:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  monkeypatch.setattr(trainer, "open_loader", loader)


def test_it_learns_and_leaves_a_model(whole, tmp_path, capsys):
  losses, params = whole
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


def test_a_loader_that_dies_of_the_same_signal_loses_nothing(whole, tmp_path, monkeypatch):
  """Ctrl-C reaches a loader's worker processes as well."""

  taken, add = threading.Event(), trainer.metrics.MetricLog.add

  def note(log, step, scalars):
    add(log, step, scalars)
    if step == 13:
      taken.set()

  def loader(config, architecture, start_step):
    for index, batch in enumerate(toy.open_loader(config, architecture, start_step)):
      if start_step + index == 13:
        assert taken.wait(60)  # the loader runs ahead of the steps
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        raise RuntimeError("a worker process is gone")
      yield batch

  with monkeypatch.context() as patch, pytest.raises(Preempted, match="after step 13"):
    patch.setattr(trainer, "open_loader", loader)
    patch.setattr(trainer.metrics.MetricLog, "add", note)
    trainer.train(toy.config(ema_decay=0.9), tmp_path)
  trainer.train(toy.config(ema_decay=0.9), tmp_path)
  assert toy.losses(tmp_path) == whole[0]


def test_a_crash_goes_back_to_the_last_save(whole, tmp_path, monkeypatch):
  def crash(*args):
    for index, batch in enumerate(toy.open_loader(*args)):
      if index == 17:
        raise OSError("the disk with the data is gone")
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(trainer, "open_loader", crash)
    with pytest.raises(OSError, match="is gone"):
      trainer.train(toy.config(ema_decay=0.9), tmp_path)
  assert max(toy.losses(tmp_path)) > 10
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 18, "lo')  # as a kill leaves it
  trainer.train(toy.config(ema_decay=0.9), tmp_path)
  assert toy.losses(tmp_path) == whole[0]


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
    batch = next(toy.open_loader(*args))
    while True:
      yield batch

  monkeypatch.setattr(trainer, "open_loader", same_batch)
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
])  # fmt: skip
def test_bad_config_leaves_nothing(tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    trainer.train(toy.config(**changes), tmp_path / "run")
  assert not (tmp_path / "run/checkpoints").exists() or not os.listdir(tmp_path / "run/checkpoints")


def test_progress_line_and_overview(tmp_path, capsys):
  trainer.train(toy.config(steps=4, log_every=2), tmp_path)
  out = capsys.readouterr().out
  lines = [line for line in out.splitlines() if line.startswith("step ")]
  assert [line.split()[1] for line in lines] == ["1/4", "2/4", "4/4"]
  assert all(word in lines[-1] for word in ("loss", "examples/s", "ETA"))
  assert "136 trained" in out and "144 frozen" in out and "random" in out
  assert list(toy.losses(tmp_path)) == [1, 2, 4]


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
  """A save every step, so that many kills fall into one."""
  args = json.dumps({"save_every": 1, "steps": 60, "data": {"sleep": 0.01}})
  assert toy.run(tmp_path / "whole", args).wait() == 0
  rng = np.random.default_rng(0)
  for _ in range(6):
    process = toy.run(tmp_path / "cut", args)
    toy.wait_for(tmp_path / "cut", 1, process)
    time.sleep(rng.uniform(0, 1.5))
    process.kill()
    process.wait()
    if (tmp_path / "cut/model").exists():
      break
  assert toy.run(tmp_path / "cut", args).wait() == 0
  assert toy.losses(tmp_path / "cut") == toy.losses(tmp_path / "whole")
