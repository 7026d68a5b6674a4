"""The quickstart's own logic: order, resuming, what it refuses, what it tells. The heavy steps are stood in for."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from blip3o_jax.apps import quickstart
from blip3o_jax.cli import make_parser
from blip3o_jax.data import outputs, shapes
from blip3o_jax.errors import CheckFailed, Preempted, UserError
from blip3o_jax.evaluation import shapes as evaluation


class World:
  """Stands in for every heavy step, notes the calls, and can fail on request."""

  def __init__(self, monkeypatch):
    self.calls, self.fail, self.micro, self.hash = [], None, True, ["a", "a"]
    for name in ("_corpus", "_take_frozen", "_train", "_look", "_copy", "_evaluate", "_samples"):
      monkeypatch.setattr(quickstart, name, getattr(self, name))
    monkeypatch.setattr(quickstart, "_has_micro", lambda: self.micro)
    monkeypatch.setattr(quickstart.model_dir, "annotate", lambda *args, **kwargs: None)

  def _note(self, call):
    if self.fail == call:
      raise Preempted("stopped")
    self.calls.append(call)

  def _corpus(self, path, sizes):
    self._note("corpus" + (" all" if not sizes else ""))
    folder = path / "understanding"
    folder.mkdir(parents=True)
    outputs.write_atomically(folder / "a.png", outputs.encode_png(np.zeros((64, 64, 3))))
    turns = [{"from": "human", "value": "<image>\nwhat colour is the circle?"}, {"from": "gpt", "value": "red"}]
    (folder / "heldout.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}) + "\n")

  def _take_frozen(self, target):
    self._note("frozen")

  def _train(self, workdir, name, source, overrides):
    assert overrides == (quickstart.QUICK[name] if "frozen" in self.calls else ())
    self._note(f"{name} on {source.relative_to(workdir).as_posix() if source else 'nothing'}")
    lines = [json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in (1, 2, 3)]
    outputs.write_atomically(workdir / "stages" / name / "metrics.jsonl", "".join(lines).encode())

  def _look(self, directory, questions):
    self._note(f"look at {directory.name}")
    return {"hash": self.hash.pop(0) * 64, "answers": ["red"]}

  def _copy(self, source, target):
    self._note("copy")

  def _evaluate(self, source, out, questions):
    self._note(f"score {source if source == 'micro' else source.name}")

    class Painter:
      def generate(self, prompts, *, num, seed):
        return [[np.full((64, 64, 3), 245, np.uint8)] * num for _ in prompts]

    evaluation.evaluate(Painter(), evaluation.prompts(limit=6), out)

  def _samples(self, source, path):
    self._note("samples")
    picture = np.zeros((2, 64, 64, 3), np.uint8)
    np.savez(path, seeds=np.stack([picture, picture]), originals=picture, decoded=picture)


@pytest.fixture
def world(monkeypatch):
  return World(monkeypatch)


WHOLE = [
  "corpus", "frozen", "look at frozen", "generation on frozen", "instruct on stages/generation/model", "copy",
  "look at model", "score model", "score micro", "samples",
]  # fmt: skip


def test_all_steps_in_order_then_none_again(world, tmp_path, capsys):
  result = quickstart.run(tmp_path / "q")
  assert world.calls == WHOLE
  said = capsys.readouterr().out
  assert "[1/10]" not in said and "[11/11] report" in said  # what is counted is what is announced
  assert "blip3o generate --model" in said.splitlines()[-1]
  assert result.score.overall == 0 and result.peak_bytes > 1e6
  text = result.report.read_text()
  for part in ("micro, the bundled model", "content hash aaaaaaaaaaaa", "instruct", "Where the time went"):
    assert part in text
  assert (tmp_path / "q" / "grid.png").stat().st_size > 1000

  again = quickstart.run(tmp_path / "q")
  assert world.calls == WHOLE and again.seconds == result.seconds
  assert "done before" in capsys.readouterr().out


def test_from_scratch_trains_every_stage_on_the_one_before(world, tmp_path):
  world.micro = False
  assert quickstart.run(tmp_path / "q", from_scratch=True).micro is None
  assert [call for call in world.calls if " on " in call] == [
    "vae on nothing", "clip on stages/vae/model", "decoder on stages/clip/model",
    "understanding on stages/decoder/model", "generation on stages/understanding/model",
    "instruct on stages/generation/model",
  ]  # fmt: skip
  assert world.calls[0] == "corpus all" and "score micro" not in world.calls
  first_look = world.calls.index("look at model")
  assert world.calls[first_look - 1].startswith("understanding") and world.calls[first_look + 1].startswith(
    "generation"
  )


def test_a_stopped_run_goes_on_where_it_stopped(world, tmp_path):
  world.fail = "instruct on stages/generation/model"
  with pytest.raises(Preempted):
    quickstart.run(tmp_path / "q")
  steps = json.loads((tmp_path / "q" / "quickstart.json").read_text())["steps"]
  assert steps["generation"]["done"] and not steps["instruct"]["done"]
  world.fail = None
  quickstart.run(tmp_path / "q")
  assert world.calls == WHOLE


def test_time_of_a_stopped_step_counts(tmp_path, monkeypatch):
  now = iter([0.0, 5.0, 0.0, 2.0])
  monkeypatch.setattr(quickstart.time, "perf_counter", lambda: next(now))
  steps = quickstart.Steps(tmp_path, 1, from_scratch=False)
  with pytest.raises(Preempted):
    steps.run("train", "", (lambda: (_ for _ in ()).throw(Preempted())))
  steps = quickstart.Steps(tmp_path, 1, from_scratch=False)
  assert steps.run("train", "", lambda x: x + 1, 41) == 42
  assert steps.times() == [("train", "", 7.0)]


def test_a_changed_language_model_is_found(world, tmp_path):
  world.hash = ["a", "b"]
  with pytest.raises(CheckFailed, match="hash"):
    quickstart.run(tmp_path / "q")
  assert "score model" not in world.calls


def test_refusals(world, tmp_path):
  quickstart.run(tmp_path / "q")
  with pytest.raises(UserError, match="from_scratch False"):
    quickstart.run(tmp_path / "q", from_scratch=True)
  world.micro = False
  with pytest.raises(UserError, match="--from-scratch"):
    quickstart.run(tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_a_stage_is_trained_with_its_own_config_here(tmp_path, monkeypatch):
  seen = {}
  monkeypatch.setattr(quickstart, "train", lambda config, workdir: seen.update(config=config, workdir=workdir))
  monkeypatch.chdir(tmp_path)
  quickstart._train(Path("q"), "clip", Path("q/stages/vae/model"), ("steps=7",))
  assert seen["config"].steps == 7
  assert seen["config"].data.path == str(tmp_path / "q" / "corpus" / "contrastive")
  assert seen["config"].init_from == str(tmp_path / "q" / "stages" / "vae" / "model")
  assert seen["workdir"] == Path("q/stages/clip")
  assert seen["config"].tokenizer == ""
  quickstart._train(Path("q"), "vae", None, ())
  assert seen["config"].tokenizer == str(tmp_path / "q" / "corpus" / "tokenizer") and seen["config"].init_from == ""


@pytest.mark.parametrize("stage", quickstart.STAGES)
def test_every_stage_has_a_config(stage):
  assert quickstart.config_file(stage).name == f"{stage}.py"


def test_missing_config_is_told():
  with pytest.raises(UserError, match="source checkout"):
    quickstart.config_file("distillation")


def test_what_to_try_next_are_commands_that_there_are(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  picture = tmp_path / "pictures/000-0.png"  # one command draws it, another asks about it
  picture.parent.mkdir()
  picture.touch()
  for _, command in quickstart.commands(Path("my runs/model")):
    program, *args = shlex.split(command)
    assert program == "blip3o" and make_parser().parse_args(args).model in ("my runs/model", Path("my runs/model"))


def test_the_prompts_it_shows_off_are_not_held_out():
  for colour, shape in (("orange", "circle"), ("purple", "square"), ("red", "circle"), ("blue", "square")):
    assert (colour, shape) not in shapes.HELD_OUT_PAIRS
