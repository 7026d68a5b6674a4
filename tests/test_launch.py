"""The launchers: what they print, what they refuse, and how they go on after status 75.

The clouds' programs are stand-ins on the PATH that note their calls and answer from a file; the scripts are real.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TPU = ["--name", "b3o", "--zone", "us-west4-a"]
UP = {
  "tpu_pod.sh": [*TPU, "--type", "v5litepod-16"],
  "gke_xpk.sh": [*TPU, "--cluster", "pod", "--type", "v6e-256", "--image", "us/blip3o:1"],
  "slurm_gpu.sh": ["--name", "b3o", "--nodes", "2"],
}

# Called as any of the programs: a line a call goes to `calls`; the first line of `answers` whose pattern is in the call
# is taken out of the file and printed.
STAND_IN = """#!{python}
import fcntl, os, shlex, sys
folder = os.environ["STAND_IN"]
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(folder + "/lock", "w") as lock:
  fcntl.flock(lock, fcntl.LOCK_EX)
  with open(folder + "/calls", "a") as calls:
    calls.write(shlex.join(words) + "\\n")
  lines = open(folder + "/answers").read().splitlines()
  for i, line in enumerate(lines):
    pattern, answer = line.split("=>")
    if all(part in " ".join(words) for part in pattern.split()):
      open(folder + "/answers", "w").write("\\n".join(lines[:i] + lines[i + 1:]))
      print(answer.strip().replace(",", "\\n"))
      break
"""


def shell_words(text: str) -> list[str]:
  """As shlex.split, but `;` ends a word."""
  lexer = shlex.shlex(text, posix=True, punctuation_chars=";")
  lexer.whitespace_split = True
  return list(lexer)


class Cloud:
  """A folder of stand-ins, the answers that they will give, and the calls that they got."""

  def __init__(self, folder: Path):
    self.folder = folder
    for name in ("gcloud", "xpk", "kubectl", "sbatch", "scancel", "squeue"):
      path = folder / "bin" / name
      path.parent.mkdir(exist_ok=True)
      path.write_text(STAND_IN.replace("{python}", sys.executable))
      path.chmod(0o755)
    self.answer()

  def answer(self, *lines: str) -> None:
    (self.folder / "answers").write_text("\n".join(lines))
    (self.folder / "calls").write_text("")

  def run(self, script: str, *words: str) -> subprocess.CompletedProcess:
    env = os.environ | {
      "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
      "STAND_IN": str(self.folder),
      "BLIP3O_STATE": str(self.folder / "state"),
      "BLIP3O_POLL_SECONDS": "0",
    }
    return subprocess.run(
      ["bash", str(ROOT / "launch" / script), *words], capture_output=True, text=True, env=env, timeout=60
    )

  @property
  def calls(self) -> list[list[str]]:
    return [shlex.split(line) for line in (self.folder / "calls").read_text().splitlines()]

  def count(self, *parts: str) -> int:
    return sum(all(part in " ".join(call) for part in parts) for call in self.calls)


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


@pytest.mark.parametrize("job", ["train", "generate", "caption", "cache-features"])
@pytest.mark.parametrize("script", UP)
def test_dry_run_prints_the_commands_and_runs_none(cloud, script, job):
  done = cloud.run(script, "up", job, *UP[script], "--dry-run", "--", "--workdir", "gs://bucket/a b")
  assert done.returncode == 0, done.stderr
  assert cloud.calls == [] and not (cloud.folder / "state").exists()
  typed = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
  programs = {"tpu_pod.sh": "gcloud", "gke_xpk.sh": "xpk", "slurm_gpu.sh": "sbatch"}
  assert any(words[0] == programs[script] for words in typed)
  # What the far shell reads is the job and its words again, the blank included.
  if script == "slurm_gpu.sh":
    far = next(line for line in done.stdout.splitlines() if line.startswith("srun"))
  else:
    (far,) = [word for words in typed for word in words if word.startswith("--command=") and "LIBTPU_INIT_ARGS" in word]
  for _ in range(3):
    if (words := shell_words(far)) and "gs://bucket/a b" in words:
      break
    far = next(word for word in words if "gs://bucket" in word)
  at = words.index(job)
  assert words[at + 1 : at + 3] == ["--workdir", "gs://bucket/a b"]
  assert (words[at - 1] == "data") == (job in ("caption", "cache-features"))


BAD = ["a b", "a;reboot", "$(reboot)", "a'b", 'a"b', "-x", "A", "", "a" * 60, "a\nb"]


@pytest.mark.parametrize("script", UP)
def test_bad_names_are_one_line_and_2(cloud, script):
  given = UP[script]
  for name in BAD:
    done = cloud.run(script, "up", "train", "--name", name, *given[2:], "--", "--config", "c.py")
    assert (done.returncode, done.stdout) == (2, ""), name
    assert done.stderr.count("\n") == 1 and "--name" in done.stderr and cloud.calls == []


@pytest.mark.parametrize(
  "script, words, said",
  [
    ("tpu_pod.sh", ["up", "dance", *UP["tpu_pod.sh"], "--", "x"], "train generate caption cache-features"),
    ("tpu_pod.sh", ["up", "train", *TPU, "--type", "v3-8", "--", "x"], "v5litepod"),
    ("tpu_pod.sh", ["up", "train", *UP["tpu_pod.sh"], "--zone", "a;b", "--", "x"], "--zone"),
    ("tpu_pod.sh", ["up", "train", *UP["tpu_pod.sh"], "--slices", "0", "--", "x"], "--slices"),
    ("tpu_pod.sh", ["up", "train", *UP["tpu_pod.sh"], "--env", "a b=c", "--", "x"], "NAME=VALUE"),
    ("tpu_pod.sh", ["up", "train", *UP["tpu_pod.sh"]], "after --"),
    ("tpu_pod.sh", ["up", "train", *UP["tpu_pod.sh"], "--config", "x"], "after --"),
    ("tpu_pod.sh", ["fly"], "no command"),
    ("tpu_pod.sh", ["down", "--name"], "needs a value"),
    ("gke_xpk.sh", ["up", "train", *UP["gke_xpk.sh"], "--image", "a b", "--", "x"], "--image"),
    ("slurm_gpu.sh", ["up", "train", *UP["slurm_gpu.sh"], "--partition", "a,b;c", "--", "x"], "--partition"),
  ],
)
def test_bad_words_are_one_line_and_2(cloud, script, words, said):
  done = cloud.run(script, *words)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.count("\n") == 1 and said in done.stderr and cloud.calls == []


ACTIVE = "describe state.state => ACTIVE"
IDLE = "status 2>/dev/null => gone"  # what is found before the job is started


def test_a_tpu_job_goes_on_after_75_and_after_its_slice_was_taken(cloud):
  cloud.answer(
    # The slice is not there, is asked for, and comes. The first attempt is pre-empted on both workers.
    "describe state.state => ",
    "describe state.state => WAITING_FOR_RESOURCES",
    *[ACTIVE] * 3,
    IDLE,
    "status 2>/dev/null => running,75",
    "status 2>/dev/null => 75,75",
    # The second loses its slice, which is deleted and asked for again; the third is done.
    "describe state.state => SUSPENDED",
    "describe state.state => SUSPENDED",
    ACTIVE,
    ACTIVE,
    "status 2>/dev/null => 0,0",
  )
  done = cloud.run("tpu_pod.sh", "up", "train", *UP["tpu_pod.sh"], "--spot", "--", "--config", "c.py")
  assert done.returncode == 0, done.stderr
  assert cloud.count("queued-resources create") == 2 and cloud.count("queued-resources delete") == 1
  assert cloud.count("setsid", "--worker=all") == 3 and cloud.count("scp") == 2
  assert cloud.count("create", "--spot", "--accelerator-type=v5litepod-16", "v2-alpha-tpuv5-lite") == 2


def test_a_tpu_job_that_fails_is_not_repeated(cloud):
  cloud.answer(*[ACTIVE] * 3, IDLE, "status 2>/dev/null => 0,2", ACTIVE)
  done = cloud.run("tpu_pod.sh", "up", "train", *UP["tpu_pod.sh"], "--", "--config", "c.py")
  assert done.returncode == 2 and "failed with status 2" in done.stderr
  assert cloud.count("setsid") == 1 and cloud.count("queued-resources create") == 0


def test_a_job_that_runs_is_followed_and_not_started_twice(cloud):
  """As after this machine was off."""
  cloud.answer(*[ACTIVE] * 4, *["status 2>/dev/null => running,running"] * 2, "status 2>/dev/null => 0,0")
  done = cloud.run("tpu_pod.sh", "up", "train", *UP["tpu_pod.sh"], "--", "--config", "c.py")
  assert done.returncode == 0, done.stderr
  assert cloud.count("setsid") == cloud.count("scp") == cloud.count("queued-resources create") == 0


def test_attempts_are_limited(cloud):
  cloud.answer(*[ACTIVE] * 8, IDLE, *["status 2>/dev/null => 75"] * 8)
  done = cloud.run("tpu_pod.sh", "up", "train", *UP["tpu_pod.sh"], "--attempts", "2", "--", "--config", "c.py")
  assert done.returncode == 75 and cloud.count("setsid") == 2


def test_only_what_was_created_is_deleted(cloud):
  done = cloud.run("tpu_pod.sh", "down", *TPU)
  assert done.returncode == 2 and "not asked for by this script" in done.stderr and cloud.calls == []
  # A slice that somebody else made is used, and stays.
  cloud.answer(*[ACTIVE] * 3, IDLE, "status 2>/dev/null => 0")
  assert cloud.run("tpu_pod.sh", "up", "train", *UP["tpu_pod.sh"], "--", "x").returncode == 0
  assert cloud.run("tpu_pod.sh", "down", *TPU).returncode == 2 and cloud.count("delete") == 0
  cloud.answer("describe state.state => ", *[ACTIVE] * 3, IDLE, "status 2>/dev/null => 0")
  assert cloud.run("tpu_pod.sh", "up", "train", *UP["tpu_pod.sh"], "--", "x").returncode == 0
  assert cloud.run("tpu_pod.sh", "down", *TPU).returncode == 0
  assert cloud.calls[-1][:6] == ["gcloud", "compute", "tpus", "queued-resources", "delete", "b3o"]
  for script, words in (("gke_xpk.sh", [*TPU, "--cluster", "pod"]), ("slurm_gpu.sh", ["--name", "other"])):
    assert cloud.run(script, "down", *words).returncode == 2
  assert cloud.count("xpk") == cloud.count("scancel") == 0


def test_slices_are_nodes_of_one_request(cloud):
  cloud.answer("describe state.state => ", *[ACTIVE] * 3, *[IDLE] * 2, *["status 2>/dev/null => 0"] * 2)
  done = cloud.run("tpu_pod.sh", "up", "train", *UP["tpu_pod.sh"], "--slices", "2", "--", "x")
  assert done.returncode == 0, done.stderr
  assert cloud.count("create", "--node-count=2", "--node-prefix=b3o") == 1
  assert cloud.count("setsid", "ssh b3o-0") == cloud.count("setsid", "ssh b3o-1") == 1


def test_a_gke_job_is_submitted_again_after_75(cloud):
  said = "blip3o ended with status"
  cloud.answer(f"kubectl b3o-1 => {said} 75,{said} 75", "kubectl b3o-2 => ", f"kubectl b3o-3 => {said} 0,{said} 0")
  done = cloud.run("gke_xpk.sh", "up", "train", *UP["gke_xpk.sh"], "--", "x")
  assert done.returncode == 0, done.stderr
  made = [word for call in cloud.calls for word in call if word.startswith("--workload=")]
  assert made == ["--workload=b3o-1", "--workload=b3o-2", "--workload=b3o-3"]
  cloud.answer()
  assert cloud.run("gke_xpk.sh", "down", *TPU, "--cluster", "pod").returncode == 0
  assert cloud.count("xpk workload delete") == 3
  cloud.answer(f"kubectl b3o-1 => {said} 75,{said} 2")
  done = cloud.run("gke_xpk.sh", "up", "train", *UP["gke_xpk.sh"], "--", "x")
  assert done.returncode == 2 and cloud.count("workload create") == 1


def test_a_slurm_script_puts_itself_back_after_75(cloud, tmp_path):
  """The very script that --dry-run prints, with SLURM's programs standing in."""
  done = cloud.run("slurm_gpu.sh", "up", "train", *UP["slurm_gpu.sh"], "--attempts", "3", "--dry-run", "--", "x y")
  script = done.stdout[done.stdout.index("#!/usr/bin/env bash") :]
  (tmp_path / "job.sh").write_text(script)
  for status, restarts, again in ((75, 0, True), (75, 2, False), (0, 0, False), (3, 0, False)):
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\nexit {status}\n")
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/bash\necho "$@" >{tmp_path}/requeued\n')
    for name in ("srun", "scontrol"):
      (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "requeued").unlink(missing_ok=True)
    env = {
      "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
      "SLURM_JOB_ID": "7",
      "SLURM_RESTART_COUNT": str(restarts),
    }
    assert subprocess.run(["bash", str(tmp_path / "job.sh")], env=env).returncode == status
    assert (tmp_path / "requeued").exists() == again
    assert not again or (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_shellcheck_passes():
  program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  if program is None:
    pytest.skip("shellcheck is not installed; the test extra brings it")
  done = subprocess.run(
    [program, "-x", *sorted(map(str, (ROOT / "launch").glob("*.sh")))], cwd=ROOT, capture_output=True
  )
  assert done.returncode == 0, done.stdout.decode()


def test_the_compiler_knows_every_flag():
  """libtpu refuses to start with a flag that it does not have."""
  pytest.importorskip("libtpu")
  code = "from blip3o_jax.planning.topology import get; get('v5e:2x2')"
  for kind in ("v4-8", "v5litepod-8", "v6e-8", "--xla_tpu_no_such_flag=1"):  # v5p has the flags of v4
    read = ["bash", "-c", f"source launch/lib.sh; tpu_flags {kind}"]
    flags = (
      kind if kind[0] == "-" else subprocess.run(read, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
    assert flags
    done = subprocess.run(
      [sys.executable, "-c", code], env=os.environ | {"LIBTPU_INIT_ARGS": flags}, capture_output=True
    )
    assert (done.returncode == 0) == (kind[0] != "-"), kind
