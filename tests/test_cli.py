"""The `blip3o` command: what it passes on, what it prints, and its exit statuses."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from blip3o_jax import cli
from blip3o_jax.errors import CheckFailed, Preempted, Problems, UserError


def run(*words):
  """Exit status of one command, whether it returns or argparse leaves."""
  try:
    return cli.main([str(word) for word in words])
  except SystemExit as leaving:
    return leaving.code


@pytest.fixture
def replace(monkeypatch):
  """`replace("package.module", name=function)` puts a stand-in where a command imports its work from."""

  def put(module, **names):
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**names))
    parent, _, child = module.rpartition(".")
    __import__(parent)
    monkeypatch.setattr(sys.modules[parent], child, sys.modules[module], raising=False)

  return put


@pytest.mark.parametrize(
  ("error", "status", "line"),
  [
    (CheckFailed("missed"), 1, "missed"),
    (UserError("no such\nthing"), 2, "no such thing"),
    (Preempted("saved"), 75, "saved"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), 2, "a/b: No such file or directory"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
    (ValueError("RESOURCE_EXHAUSTED: write: No space left on device [x]"), 2, "No space left on device"),
    (ValueError("RESOURCE_EXHAUSTED: Out of memory.\nMore"), 2, "no memory left: cut the weights over more devices"),
    (KeyboardInterrupt(), 130, "interrupted"),
  ],
)
def test_errors_are_one_line_and_a_status(replace, capsys, error, status, line):
  def fail(*args, **kwargs):
    raise error

  replace("blip3o_jax.verification", verify=fail)
  assert run("verify", "somewhere") == status
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("blip3o: ") and err.count("\n") == 1 and line in err


def test_sigterm_is_not_taken_for_what_a_library_raised(replace, capsys):
  def download(*args, **kwargs):
    try:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(10)
    except Exception as error:
      raise UserError("the download failed") from error

  replace("blip3o_jax.verification", verify=download)
  assert run("verify", "somewhere") == 75 and "SIGTERM" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EBADF, "Bad file descriptor")])
def test_a_bug_keeps_its_traceback(replace, error):
  def fail(*args, **kwargs):
    raise error

  replace("blip3o_jax.verification", verify=fail)
  with pytest.raises(type(error)):
    run("verify", "somewhere")


@pytest.mark.parametrize(
  "words",
  [
    [],
    ["nothing"],
    ["train", "--workdir", "w"],
    ["train", "--config", "c.py", "--workdir", "w", "--confg.steps=1"],
    ["verify", "d", "--config.steps=1"],
    ["generate", "--model", "m", "--out", "o"],
    ["generate", "--model", "m", "--out", "o", "--prompt", "a", "--prompts", "b"],
    ["generate", "--model", "m", "--out", "o", "--prompt", "a", "--num", "0"],
    ["generate", "--model", "m", "--out", "o", "--prompt", "a", "--step", "3"],
    ["demo", "--model", "m", "--port", "65536"],
    ["demo", "--model", "m", "--port", "-1"],
    ["demo", "--model", "m", "--share"],
    ["data"],
    # Before weights are read:
    ["generate", "--model", "m", "--out", "o", "--prompt", "a", "--seed", "-1"],
    ["generate", "--model", "m", "--out", "o", "--prompts", __file__, "--set", "form=poem"],
    ["generate", "--model", "m", "--out", "o", "--prompt", "a", "--guidance", "nan"],
    ["eval", "shapes", "--model", "m", "--out", "o", "--seed", str(2**32)],
    ["edit", "--model", "m", "--out", "o", "--image", "none.png"],
    ["reconstruct", "--model", "m", "--out", "o", "--image", "none.png"],
    ["chat", "--model", "m", "--image", "none.png"],
    ["eval", "shapes", "--model", "m", "--out", "o", "--split", "other"],
    ["data", "make-shapes", "--out", "o", "--shard-size", "0"],
  ],
)
def test_usage_errors_are_one_line_and_2(capsys, words):
  assert run(*words) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("blip3o: ") and err.count("\n") == 1


@pytest.mark.parametrize(
  "words",
  [
    ["generate", "--model", "m", "--prompt", "a"],
    ["edit", "--model", "m", "--image", __file__],
    ["reconstruct", "--model", "m", "--image", __file__],
    ["chat", "--model", "m"],
    ["eval", "shapes", "--model", "m"],
    ["data", "inspect", "--config", "c.py"],
    ["data", "make-shapes"],
    ["doctor"],
    ["bench", "dit"],
  ],
)
def test_no_folder_is_made_in_the_place_of_a_bucket(capsys, tmp_path, monkeypatch, words):
  """Told before anything is loaded; nor is there work for a file that lies in the way."""
  monkeypatch.chdir(tmp_path)
  assert run(*words, "--out", "gs://bucket/m") == 2
  err = capsys.readouterr().err
  assert "gs://bucket/m: this needs a file system; mount the bucket" in err and err.count("\n") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "words",
  [
    ["edit", "--model", "m", "--image", __file__],
    ["reconstruct", "--model", "m", "--image", __file__],
    ["chat", "--model", "m"],
    ["eval", "shapes", "--model", "m"],
    ["doctor"],
    ["bench", "dit"],
  ],
)
def test_a_folder_that_cannot_be_is_told_before_anything_is_loaded(capsys, tmp_path, words):
  (tmp_path / "file").write_text("in the way")
  assert run(*words, "--out", tmp_path / "file" / "o" / "x") == 2
  assert str(tmp_path / "file") in capsys.readouterr().err


def test_train_reads_the_config_and_its_overrides(replace, tmp_path, capsys):
  file = tmp_path / "x.py"
  file.write_text("from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'steps': 10})\n")
  called, started = [], []
  replace("blip3o_jax.sharding.distributed", start=lambda: started.append(len(called)))
  replace("blip3o_jax.training.trainer", train=lambda *args, **kwargs: called.append((*args, kwargs)))
  assert run("train", "--config", file, "--workdir", tmp_path / "w", "--config.optimizer.learning_rate=0.5") == 0
  ((config, workdir, kwargs),) = called
  words = f"blip3o train --config {file} --workdir {tmp_path / 'w'} --config.optimizer.learning_rate=0.5"
  assert kwargs == {"command": words}
  assert (config.steps, config.optimizer.learning_rate, workdir) == (10, 0.5, str(tmp_path / "w"))
  assert run("train", "--config", file, "--workdir", "w", "--config.stepz=1") == 2
  assert "did you mean steps" in capsys.readouterr().err and len(called) == 1
  assert run("train", "--config", file, "--workdir", "w", "--profile", "5") == 0 and called[1][0].profile == 5
  assert started == [0, 1]  # before either, and not for the slip


def test_demo_passes_on_where_to_listen(replace):
  called = []
  replace("blip3o_jax.apps.demo", run=lambda *args, **options: called.append((*args, options)))
  assert run("demo", "--model", "micro") == 0
  assert run("demo", "--model", "m", "--host", "0.0.0.0", "--port", "0", "--compile-cache", "c") == 0
  assert called == [("micro", "127.0.0.1", 7860, {}), ("m", "0.0.0.0", 0, {"compile_cache": "c"})]


class FakeModel:
  """Stands in for inference.model.Model."""

  def reconstruct(self, image):
    return [np.full((4, 4, 3), 7, np.uint8)]

  def edit(self, images, instruction, **settings):
    self.asked = instruction, settings
    return [np.full((4, 4, 3), i, np.uint8) for i in range(len(images))]


@pytest.fixture
def model(replace):
  fake = FakeModel()
  replace("blip3o_jax.inference.model", load_here=lambda name, **options: fake)
  return fake


@pytest.fixture
def jobs(replace):
  """What jobs.generate was called with."""
  called = []

  def draw_few(*args, **options):
    called.append((*args, options))
    yield Path("o/000-0.png"), "a"

  def run(model, prompts, out, **options):
    called.append((model, prompts, out, options))
    return "o/manifest.jsonl"

  replace("blip3o_jax.jobs.generate", draw_few=draw_few, run=run, Rows=lambda path: f"rows of {path}")
  replace("blip3o_jax.sharding.distributed", start=lambda: called.append("start"))
  return called


def test_generate_a_few(jobs, tmp_path, capsys):
  """What was not given is left to the model; settings are JSON, or else text."""
  words = ["generate", "--model", "m", "--prompt", "a", "b", "--out", tmp_path, "--num", 2, "--seed", 5]
  assert run(*words) == 0 and jobs == [("m", ["a", "b"], tmp_path, {"num": 2, "seed": 5, "settings": {}})]
  assert capsys.readouterr().out == "o/000-0.png  a\n"
  more = ["--guidance", "1.5", "--steps", 3, "--set", "exact_times=true", "--set", "decoder_null=zeros"]
  assert run(*words, *more, "--compile-cache", "c") == 0
  settings = {"guidance": 1.5, "steps": 3, "exact_times": True, "decoder_null": "zeros"}
  assert jobs[1][-1] == {"num": 2, "seed": 5, "settings": settings, "compile_cache": "c"}
  assert run(*words, "--batch-size", 8) == 0 and jobs[2][-1] == {**jobs[0][-1], "batch_size": 8}
  assert run(*words, "--set", "exact_times") == 2
  assert "exact_times is not NAME=VALUE" in capsys.readouterr().err


def test_generate_all_of_a_file(jobs, capsys):
  assert run("generate", "--model", "m", "--prompts", "p.jsonl", "--out", "o") == 0
  assert jobs == ["start", ("m", "rows of p.jsonl", Path("o"), {"num": 4, "seed": 0, "settings": {}})]
  assert capsys.readouterr().out == "o/manifest.jsonl\n"
  words = ["--batch-size", 8, "--fsdp", 2, "--num", 1]
  assert run("generate", "--model", "m", "--prompts", "p.jsonl", "--out", "o", *words) == 0
  assert jobs[-1][-1] == {"num": 1, "seed": 0, "settings": {}, "batch_size": 8, "fsdp": 2}


@pytest.mark.parametrize(("name", "num"), [("geneval", 4), ("dpg", 4), ("wise", 1), ("mjhq", 1)])
def test_eval_folders(jobs, replace, capsys, name, num):
  replace(f"blip3o_jax.evaluation.{name}", Prompts=lambda path: f"{name} of {path}")
  assert run("eval", name, "--model", "m", "--prompts", "p", "--out", "o", "--steps", 9) == 0
  assert jobs[1] == ("m", f"{name} of p", Path("o"), {"num": num, "seed": 42, "settings": {"steps": 9}})
  assert f"`blip3o eval {name} --help` says how to score it" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("geneval", "python evaluation/evaluate_images.py OUT/images"),
    ("dpg", "bash dpg_bench/dist_eval.sh OUT/images RESOLUTION"),
    ("wise", "python gpt_eval.py --json_path"),
    ("mjhq", "fid.compute_fid('OUT/images'"),
    ("understanding", "python -m lmms_eval --model blip3o_jax"),
  ],
)
def test_help_of_a_benchmark_says_how_to_score(capsys, name, words):
  assert run("eval", name, "--help") == 0
  assert words in capsys.readouterr().out


def test_chat_edit_and_reconstruct(model, replace, tmp_path, capsys):
  called = []
  replace("blip3o_jax.apps.chat", chat=lambda *args, **settings: called.append((*args, settings)))
  x, y = tmp_path / "x.jpg", tmp_path / "y.png"
  x.touch()
  y.touch()
  words = ["--image", x, y, "--prompt", "what?", "why?", "--temperature", "0.5"]
  assert run("chat", "--model", "m", *words) == 0 and run("chat", "--model", "m") == 0
  assert called[0] == (model, ["what?", "why?"], [x, y], Path("."), {"temperature": 0.5, "seed": 0})
  assert called[1] == (model, None, [], Path("."), {"seed": 0})
  assert run("chat", "--model", "m", "--seed", 7, "--out", tmp_path / "new") == 0
  assert called[2] == (model, None, [], tmp_path / "new", {"seed": 7})
  image = ["--image", x, y, "--out", tmp_path / "o"]
  assert run("edit", "--model", "m", *image, "--instruction", "bluer", "--steps", 3) == 0
  assert model.asked == ("bluer", {"seed": 0, "steps": 3})
  assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["x-edited.png", "y-edited.png"]
  assert run("reconstruct", "--model", "m", "--image", x, "--out", tmp_path / "o") == 0
  assert (tmp_path / "o" / "x-reconstructed.png").is_file()
  capsys.readouterr()
  assert run("edit", "--model", "m", *image, "--set", "seed=5") == 2
  assert "sampling setting 'seed' is unknown" in capsys.readouterr().err
  assert run("edit", "--model", "m", "--image", x, y, x, "--out", tmp_path) == 2
  assert "two pictures would both become x-edited.png" in capsys.readouterr().err


def test_caption(replace, capsys):
  called = {}
  replace("blip3o_jax.jobs.caption", run=lambda *args, **options: called.update(args=args, **options) or "there")
  replace("blip3o_jax.sharding.distributed", start=lambda: None)
  assert run("data", "caption", "--model", "m", "--data", "d", "--out", "o", "--style", "short", "--batch-size", 4) == 0
  assert called == {"args": ("m", "d", Path("o")), "style": "short", "prompt": None, "batch_size": 4}
  assert capsys.readouterr().out == "there\n"


def test_eval_shapes_prints_families_and_questions(replace, tmp_path, capsys):
  score = types.SimpleNamespace(
    overall=0.5,
    standard_error=0.01,
    families={"colors": 0.75},
    control=0.1,
    control_families={"colors": 0.25},
    pictures=8,
    understanding={"heldout": {"overall": 0.625}},
  )
  called = {}

  def evaluate(model, out, **settings):
    called.update(settings)
    return score

  replace("blip3o_jax.evaluation.shapes", run=evaluate)
  assert run("eval", "shapes", "--model", "m", "--out", tmp_path, "--split", "seen", "--limit", 3, "--fsdp", 2) == 0
  assert called == {"split": "seen", "num": 4, "seed": 0, "questions_dir": None, "limit": 3, "fsdp": 2}
  out = capsys.readouterr().out
  for words in ("colors            0.750    0.250", "overall           0.500    0.100", "0.625"):
    assert words in out


def test_eval_understanding_passes_on_how_to_load(replace):
  called = []
  replace("blip3o_jax.evaluation.understanding", run=lambda *args, **options: called.append((args, options)))
  assert run("eval", "understanding", "--model", "m", "--tasks", "mme", "--fsdp", 4) == 0
  assert called == [(("m", "mme"), {"limit": None, "out": None, "fsdp": 4})]


def test_quickstart_and_verify_pass_on_what_they_are_given(replace, tmp_path):
  called = []
  replace("blip3o_jax.apps.quickstart", run=lambda *args: called.append(args))
  replace("blip3o_jax.verification", verify=lambda paths, as_json: called.append((paths, as_json)))
  assert run("quickstart", "--workdir", tmp_path, "--from-scratch") == 0
  assert run("verify", tmp_path, "--json") == 0
  assert called == [(tmp_path, True), ([tmp_path], True)]


def test_convert_passes_on_format_and_dtype(replace, tmp_path, capsys):
  called = []
  replace("blip3o_jax.porting.locate", convert_model=lambda *a, **k: called.append((a, k)) or ["left out: x", a[1]])
  for to in (str(tmp_path / "new"), "gs://bucket/new"):  # every letter of it: a bucket may be written
    assert run("convert", "--from", "micro", "--to", to, "--dtype", "float16") == 0
    assert called.pop() == ((["micro"], to), {"format": None, "part": None, "dtype": "float16"})
    assert capsys.readouterr().out == f"left out: x\n{to}\n"


def test_many_problems_are_a_line_each(replace, tmp_path, capsys):
  def fail(*args, **kwargs):
    raise Problems("x does not fit", ["a: expected [2],\n found [3]", "b: expected [4], found nothing"])

  replace("blip3o_jax.porting.locate", convert_model=fail)
  assert run("convert", "--from", "micro", "--to", tmp_path / "new") == 2
  assert capsys.readouterr().err == (
    "blip3o: x does not fit, 2 problems:\n  a: expected [2], found [3]\n  b: expected [4], found nothing\n"
  )


def test_nothing_is_said_of_accelerators_that_are_not_there():
  """The planner's compiler is installed here, and this is no TPU machine."""
  pytest.importorskip("libtpu")
  env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  words = ["generate", "--model", "micro", "--prompt", "a", "--out", "o", "--fsdp", "64"]
  done = subprocess.run([sys.executable, "-m", "blip3o_jax", *words], env=env, capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "fsdp=64" in done.stderr


_CONVOLUTION = """
from blip3o_jax.cli import prepare_jax
prepare_jax()
prepare_jax()
import jax, jax.numpy as jnp, os
ones = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
compiled = jax.jit(convolve).lower(ones(2, 32, 32, 64), ones(3, 3, 64, 64)).compile()
print("ynn_fusion" in compiled.as_text(), os.environ.get("XLA_FLAGS", "").count("ynn_fusion"))
"""


@pytest.mark.parametrize(
  ("flags", "printed"),
  [("", "False 1"), ("--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION", "True 1")],
)
def test_convolutions_on_a_cpu_are_xlas_own_unless_the_user_decides(flags, printed):
  if not jax.__version__.startswith("0.10."):
    pytest.skip("the flag is given to the XLA of jax 0.10 alone")
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  done = subprocess.run([sys.executable, "-c", _CONVOLUTION], env=env, capture_output=True, text=True)
  assert done.stdout.strip() == printed, done.stderr


_TEMPORARY = """
import resource
from blip3o_jax.cli import prepare_jax
prepare_jax()
faults = []
for _ in range(3):
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
  b"x" * 2**26
print(faults[2] - faults[1])
"""


@pytest.mark.parametrize(("tunables", "kept"), [(None, True), ("glibc.malloc.arena_max=2", False)])
def test_memory_is_kept_on_a_cpu_unless_the_user_decides(tunables, kept):
  if platform.libc_ver()[0] != "glibc":
    pytest.skip("the options are glibc's")
  env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": "cpu"}
  env |= {"GLIBC_TUNABLES": tunables} if tunables else {}
  done = subprocess.run([sys.executable, "-c", _TEMPORARY], env=env, capture_output=True, text=True, check=True)
  assert (int(done.stdout) < 100) == kept, "faults of a temporary of 64 MiB that was there before"


def test_data_in_one_process_each(tmp_path):
  """The real command, as a user runs it: make a corpus, look at it, and the reader of a pipe that goes away."""
  blip3o = [sys.executable, "-m", "blip3o_jax"]
  out = tmp_path / "corpus"
  sizes = ["--contrastive", "0", "--pretrain", "3", "--instruct", "0", "--understanding", "1", "--text-only", "0"]
  words = ["data", "make-shapes", "--out", out, "--seed", "3", *sizes, "--held-out", "0"]
  made = subprocess.run([*blip3o, *words], capture_output=True, text=True)
  assert (made.returncode, made.stdout.strip()) == (0, str(out)), made.stderr
  assert json.loads((out / "manifest.json").read_text())["pretrain"] == 3
  seen = subprocess.run([*blip3o, "data", "inspect", out / "pretrain"], capture_output=True, text=True)
  assert seen.returncode == 0 and "3 samples" in seen.stdout and "64 x 64" in seen.stdout, seen.stderr
  indexed = subprocess.run([*blip3o, "data", "index", out / "pretrain"], capture_output=True, text=True)
  assert (indexed.returncode, indexed.stdout) == (0, f"{out}/pretrain/000000.tar: 3 samples\n"), indexed.stderr
  none = subprocess.run([*blip3o, "data", "inspect", tmp_path / "no.jsonl"], capture_output=True, text=True)
  assert none.returncode == 2 and "Traceback" not in none.stderr and "no.jsonl" in none.stderr


def test_sigterm_is_75_and_leaves_nothing_half_written(tmp_path):
  words = [sys.executable, "-m", "blip3o_jax", "data", "make-shapes", "--out", tmp_path / "corpus"]
  process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 60
  while not any(tmp_path.glob(".corpus*/*")) and time.monotonic() < deadline:
    time.sleep(0.05)
  process.terminate()
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75 and "SIGTERM" in err and err.count("\n") == 1
  assert list(tmp_path.iterdir()) == []
