"""The launchers: what they print, what they refuse, and how they go on after status 75 and after failures of the cloud.

The clouds' programs are stand-ins on the PATH that note their calls and answer from a file; the scripts are real.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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
# is taken out of the file, unless it begins with `always`, and printed; `!N` before the answer is an exit status, and
# the answer then an error.
STAND_IN = r"""#!/usr/bin/env bash
set -f
words="${0##*/} $*"
{ printf '%q ' "${0##*/}" "$@" && echo; } >>"$STAND_IN/calls"
mapfile -t lines <"$STAND_IN/answers"
for i in "${!lines[@]}"; do
  pattern="${lines[i]%%=>*}" answer="${lines[i]#*=> }"
  for part in ${pattern#always }; do [[ "$words" == *"$part"* ]] || continue 2; done
  if [[ "$pattern" != always* ]]; then
    unset "lines[i]"
    printf '%s\n' "${lines[@]}" >"$STAND_IN/answers"
  fi
  if [[ "$answer" =~ ^!([0-9]+)\ (.*) ]]; then echo "${BASH_REMATCH[2]}" >&2; exit "${BASH_REMATCH[1]}"; fi
  printf '%s\n' "${answer//,/$'\n'}"
  exit
done
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
    for name in ("gcloud", "xpk", "kubectl", "sbatch", "scancel", "squeue", "git"):  # git packs for seconds
      path = folder / "bin" / name
      path.parent.mkdir(exist_ok=True)
      path.write_text(STAND_IN)
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
  installed = {"tpu_pod.sh": "BLIP3O_EXTRAS=tpu,gcs ", "slurm_gpu.sh": "BLIP3O_EXTRAS=cuda,gcs"}  # gs:// needs gcsfs
  assert any(installed.get(script, "") in word for words in typed for word in words)
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


ACTIVE = "always describe state.state => ACTIVE"
MISSING = "describe state.state => !1 ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource 'b3o'"
EXPIRED = "describe state.state => !1 ERROR: (gcloud.compute.tpus) There was a problem refreshing your auth tokens"
UP_TPU = ["up", "train", *UP["tpu_pod.sh"], "--", "--config", "c.py"]
UP_GKE = ["up", "train", *UP["gke_xpk.sh"], "--", "--config", "c.py"]
CLUSTER = [*TPU, "--cluster", "pod"]


def state(now):
  return f"describe state.state => {now}"


def look(answer):
  """What the workers say when they are looked at."""
  return f"--worker=all gone => {answer}"


IDLE = look("gone,gone")  # what is found before the job is started


def test_a_tpu_job_goes_on_after_75_and_after_its_slice_was_taken(cloud):
  cloud.answer(
    # The slice is not there, is asked for, and comes. The first attempt is pre-empted on both workers.
    MISSING,
    state("WAITING_FOR_RESOURCES"),
    *[state("ACTIVE")] * 3,
    IDLE,
    look("running,75"),
    look("75,75"),
    # The second loses its slice, which is deleted and asked for again; the third is done.
    *[state("SUSPENDED")] * 3,
    MISSING,
    ACTIVE,
    look("0,0"),
  )
  done = cloud.run("tpu_pod.sh", "up", "train", *UP["tpu_pod.sh"], "--spot", "--", "--config", "c.py")
  assert done.returncode == 0, done.stderr
  assert cloud.count("queued-resources create") == 2 and cloud.count("queued-resources delete") == 1
  assert cloud.count("setsid", "--worker=all") == 3 and cloud.count("scp") == 2
  assert cloud.count("create", "--spot", "--accelerator-type=v5litepod-16", "v2-alpha-tpuv5-lite") == 2


def test_a_spot_slice_is_asked_for_as_often_as_it_takes(cloud):
  cloud.answer(
    MISSING,
    *[state("FAILED")] * 2,  # a delete that fails is repeated
    "queued-resources delete => !1 no network",
    state("FAILED"),
    MISSING,
    state("SUSPENDING"),
    state("SUSPENDED"),
    MISSING,
    ACTIVE,
    IDLE,
    look("0,0"),
  )
  done = cloud.run("tpu_pod.sh", *UP_TPU)
  assert done.returncode == 0, done.stderr
  assert cloud.count("queued-resources create") == cloud.count("queued-resources delete") == 3


def test_a_slice_that_the_cloud_refuses_ends_the_launcher(cloud):
  cloud.answer("always " + MISSING, "always queued-resources create => !1 ERROR: quota")
  done = cloud.run("tpu_pod.sh", *UP_TPU)
  assert done.returncode == 2 and "refused" in done.stderr and cloud.count("ssh") == 0
  # It was never there, so nothing of that name is ours.
  assert cloud.run("tpu_pod.sh", "down", *TPU).returncode == 2 and cloud.count("delete") == 0
  # A request that came through although its answer was lost is ours.
  cloud.answer(MISSING, "always queued-resources create => !1 no network", ACTIVE, IDLE, look("0"))
  assert cloud.run("tpu_pod.sh", *UP_TPU).returncode == 0
  assert cloud.run("tpu_pod.sh", "down", *TPU).returncode == 0


def test_a_slice_that_somebody_deleted_is_not_asked_for_again(cloud):
  cloud.answer(state("ACTIVE"), IDLE, "always " + MISSING)
  done = cloud.run("tpu_pod.sh", *UP_TPU)
  assert done.returncode == 2 and "somebody deleted" in done.stderr and cloud.count("create") == 0


@pytest.mark.parametrize(
  "said, status",
  [
    (["0,2"], 2),
    (["1,running", "1,2"], 2),  # the first one ended because of the second
    (["134,running", "134,1"], 1),
  ],
)
def test_a_tpu_job_that_fails_is_not_repeated(cloud, said, status):
  cloud.answer(ACTIVE, IDLE, *map(look, said))
  done = cloud.run("tpu_pod.sh", *UP_TPU)
  assert done.returncode == status and f"failed with status {status}" in done.stderr
  assert cloud.count("setsid") == 1 and cloud.count("queued-resources create") == 0


def test_a_lost_machine_is_no_failure(cloud):
  """JAX ends the others with a status of its own, before and after the machine is back."""
  cloud.answer(ACTIVE, IDLE, look("1,running"), look("!255 no route to host"), look("1,gone"), look("0,0"))
  done = cloud.run("tpu_pod.sh", *UP_TPU)
  assert done.returncode == 0, done.stderr
  assert cloud.count("setsid") == cloud.count("scp") == 2  # what comes back may be a new machine
  # Of a slice that is being taken away workers fail first.
  cloud.answer(*[state("ACTIVE")] * 2, IDLE, look("1,134"), *[state("SUSPENDED")] * 2, ACTIVE, look("0,0"))
  assert cloud.run("tpu_pod.sh", *UP_TPU).returncode == 0 and cloud.count("setsid") == 2


def test_a_job_that_runs_is_followed_and_not_started_twice(cloud):
  """As after this machine was off, with a network that comes and goes."""
  away = look("!255 ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255]")
  cloud.answer(
    EXPIRED,
    state("ACTIVE"),
    away,
    EXPIRED,
    state("ACTIVE"),
    look("running,running"),
    EXPIRED,
    away,
    EXPIRED,
    look("running,0"),
    look(""),  # nobody said anything
    ACTIVE,
    look("0,0"),
  )
  done = cloud.run("tpu_pod.sh", *UP_TPU)
  assert done.returncode == 0, done.stderr
  assert (cloud.folder / "answers").read_text().split("\n") == [ACTIVE, ""]
  assert cloud.count("setsid") == cloud.count("scp") == cloud.count("queued-resources create") == 0
  assert cloud.run("tpu_pod.sh", "down", *TPU).returncode == 2 and cloud.count("delete") == 0


def test_attempts_are_limited(cloud):
  cloud.answer(ACTIVE, IDLE, *[look("75")] * 8)
  done = cloud.run("tpu_pod.sh", "up", "train", *UP["tpu_pod.sh"], "--attempts", "2", "--", "--config", "c.py")
  assert done.returncode == 75 and cloud.count("setsid") == 2


def test_connections_are_tried_again(cloud):
  once = "!255 connection refused"
  cloud.answer(ACTIVE, IDLE, f"scp => {once}", f"local.sh --version => {once}", f"setsid => {once}", look("0,0"))
  assert cloud.run("tpu_pod.sh", *UP_TPU).returncode == 0
  assert cloud.count("scp") == cloud.count("--version") == cloud.count("setsid") == 2
  cloud.answer(ACTIVE, IDLE, f"always scp => {once}")
  done = cloud.run("tpu_pod.sh", *UP_TPU)
  assert done.returncode == 1 and cloud.count("scp") == 5 and cloud.count("--version") == cloud.count("setsid") == 0
  # Unless nobody answers because the slice was taken away.
  cloud.answer(state("ACTIVE"), IDLE, *[f"setsid => {once}"] * 5, *[state("SUSPENDING")] * 2, ACTIVE, look("0,0"))
  assert cloud.run("tpu_pod.sh", *UP_TPU).returncode == 0 and cloud.count("setsid") == 6


def test_only_what_was_created_is_deleted(cloud):
  done = cloud.run("tpu_pod.sh", "down", *TPU)
  assert done.returncode == 2 and "not asked for by this script" in done.stderr and cloud.calls == []
  # A slice that somebody else made is used, and stays.
  cloud.answer(ACTIVE, IDLE, look("0"))
  assert cloud.run("tpu_pod.sh", *UP_TPU).returncode == 0
  assert cloud.run("tpu_pod.sh", "down", *TPU).returncode == 2 and cloud.count("delete") == 0
  cloud.answer(MISSING, ACTIVE, IDLE, look("0"))
  assert cloud.run("tpu_pod.sh", *UP_TPU).returncode == 0
  cloud.answer(ACTIVE, "delete => !1 no network")
  assert cloud.run("tpu_pod.sh", "down", *TPU).returncode == 1  # and stays ours
  assert cloud.run("tpu_pod.sh", "down", *TPU).returncode == 0
  assert cloud.calls[-1][:6] == ["gcloud", "compute", "tpus", "queued-resources", "delete", "b3o"]
  for script, words in (("gke_xpk.sh", CLUSTER), ("slurm_gpu.sh", ["--name", "other"])):
    assert cloud.run(script, "down", *words).returncode == 2
  assert cloud.count("xpk") == cloud.count("scancel") == 0


def test_slices_are_nodes_of_one_request(cloud):
  cloud.answer(
    MISSING, ACTIVE, *[IDLE] * 2, "b3o-0 gone => !255 lost", *["b3o-1 gone => 0"] * 2, look("running"), look("0")
  )
  done = cloud.run("tpu_pod.sh", "up", "train", *UP["tpu_pod.sh"], "--slices", "2", "--", "x")
  assert done.returncode == 0, done.stderr
  assert cloud.count("create", "--node-count=2", "--node-prefix=b3o") == 1
  assert cloud.count("setsid", "ssh b3o-0") == cloud.count("setsid", "ssh b3o-1") == 1
  # A slice that does not answer, and one that runs, beside one that is done.
  assert cloud.count("gone", "ssh b3o-0") == 4


def test_what_the_workers_are_told(cloud, tmp_path):
  """The very commands, in a home directory that stands for a worker's."""
  cloud.answer(ACTIVE, *[look("0,0")] * 2)
  assert cloud.run("tpu_pod.sh", *UP_TPU).returncode == 0
  told = [word.removeprefix("--command=") for call in cloud.calls for word in call if word.startswith("--command=")]
  (start,) = (command for command in told if "setsid" in command)
  (seen,) = {command for command in told if "echo gone" in command}
  (pack,) = (call for call in cloud.calls if call[:2] == ["git", "archive"])
  pack = [word for word in pack if not word.startswith("--output=")]
  assert subprocess.run([*pack, "launch"], cwd=ROOT, capture_output=True).stdout[:2] == b"\x1f\x8b"  # gzip
  home = tmp_path / "home"
  script = home / "blip3o-b3o" / "launch" / "local.sh"

  def worker(command):
    env = os.environ | {"HOME": str(home)}
    return subprocess.run(["bash", "-c", command], cwd=home, env=env, capture_output=True, text=True, timeout=20)

  def wait_for(answer):
    for _ in range(200):
      if worker(seen).stdout == answer:
        return
      time.sleep(0.02)
    raise AssertionError(worker(seen))

  home.mkdir()
  wait_for("gone\n")
  # A machine that came back without the checkout says so, and does not run anything.
  assert worker(start).returncode == 0
  wait_for("1\n")
  script.parent.mkdir(parents=True)
  script.write_text('echo "$@" >>~/started; until [[ -e ~/end ]]; do sleep 0.02; done; exit 75\n')
  for _ in range(2):  # the second changes nothing
    assert worker(start).returncode == 0
    wait_for("running\n")
  (home / "end").touch()
  wait_for("75\n")
  assert (home / "started").read_text() == "train --config c.py\n"
  worker(start)
  wait_for("75\n")
  assert (home / "started").read_text() == "train --config c.py\n" * 2
  (home / "b3o.status").unlink()  # as when the machine went down under it: the process is gone, too
  (home / "b3o.pid").write_text("999999999\n")
  assert worker(seen).stdout == "gone\n"


def test_a_worker_without_a_fitting_python_gets_one(cloud, tmp_path):
  """The machines come with Python 3.10."""
  cloud.answer(ACTIVE, *[look("0,0")] * 2)
  assert cloud.run("tpu_pod.sh", *UP_TPU).returncode == 0
  (setup,) = (word.removeprefix("--command=") for call in cloud.calls for word in call if "tar xzf" in word)
  home = tmp_path / "home"
  script = home / "launch" / "local.sh"
  script.parent.mkdir(parents=True)
  script.write_text('[[ -e ~/python3.11-venv ]] || exit 2; echo "$BLIP3O_EXTRAS $*" >>~/installed')
  subprocess.run(["tar", "czf", home / "blip3o-b3o.tar.gz", "-C", home, "launch"], check=True)
  stand_in(
    home / "bin" / "sudo", 'case "$*" in *" update") touch ~/listed ;; *) [ -e ~/listed ] && touch ~/"${*##* }" ;; esac'
  )
  env = os.environ | {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
  for _ in range(2):  # the second finds all that it needs
    subprocess.run(["bash", "-c", setup], cwd=home, env=env, check=True, timeout=20)
    (home / "bin" / "sudo").write_text("exit 1")
  assert (home / "installed").read_text() == "tpu,gcs --version\n" * 2


def jobset(name, said=""):
  return f"--ignore-not-found {name} => {said}"


def pods(name, *statuses):
  return f"pods {name} => {','.join(statuses)}"


def submitted(cloud):
  made = [call for call in cloud.calls if call[:3] == ["xpk", "workload", "create"]]
  return [word.removeprefix("--workload=") for call in made for word in call if word.startswith("--workload=")]


def ended(name, *statuses):
  """Not there, then submitted, then ended."""
  return [jobset(name), jobset(name, f"{name} StartupPolicyCompleted Failed"), pods(name, *statuses)]


def test_a_gke_job_is_submitted_again_after_75(cloud):
  cloud.answer(
    *ended("b3o-1", "75", "", "75"),
    *ended("b3o-2", "", ""),  # of a slice that was taken away
    jobset("b3o-3"),
    jobset("b3o-3", "b3o-3 StartupPolicyCompleted"),
    jobset("b3o-3", "b3o-3 Completed"),
  )
  done = cloud.run("gke_xpk.sh", *UP_GKE)
  assert done.returncode == 0, done.stderr
  assert submitted(cloud) == ["b3o-1", "b3o-2", "b3o-3"]
  assert cloud.count("--wait-for-job-completion=b3o-3") == 1
  # `down` deletes one; one was gone already; one cannot be reached, so all stay noted.
  gone = ("delete b3o-2 => !1 NotFound", jobset("b3o-2"))
  cloud.answer(*gone, "delete b3o-3 => !1 no network", jobset("b3o-3", "b3o-3 "))
  assert cloud.run("gke_xpk.sh", "down", *CLUSTER).returncode == 1 and cloud.count("workload delete") == 3
  cloud.answer(*gone)
  assert cloud.run("gke_xpk.sh", "down", *CLUSTER).returncode == 0 and cloud.count("workload delete") == 3
  assert cloud.run("gke_xpk.sh", "down", *CLUSTER).returncode == 2 and cloud.count("workload delete") == 3


def test_a_gke_job_that_fails_is_not_repeated(cloud):
  cloud.answer(*ended("b3o-1", "75", "2", "134"))
  assert cloud.run("gke_xpk.sh", *UP_GKE).returncode == 2 and submitted(cloud) == ["b3o-1"]
  # Any other status may be of a machine that was lost. The attempts of the call before do not count.
  cloud.answer(*ended("b3o-2", "1"), *ended("b3o-3", "134"), *ended("b3o-4", "75"), *ended("b3o-5", "1"))
  done = cloud.run("gke_xpk.sh", *UP_GKE[:-3], "--attempts", "4", *UP_GKE[-3:])
  assert done.returncode == 75 and len(submitted(cloud)) == 4, done.stderr
  cloud.answer(*ended("b3o-6", "1"), *ended("b3o-7", "1", ""), *ended("b3o-8", "0", "1", "134"))
  done = cloud.run("gke_xpk.sh", *UP_GKE)
  assert done.returncode == 1 and "failed with status 1" in done.stderr and len(submitted(cloud)) == 3


def test_a_gke_workload_that_runs_is_followed_and_not_submitted_twice(cloud):
  """As after this machine was off, with a network that comes and goes."""
  cloud.answer(*ended("b3o-1", "2"))
  assert cloud.run("gke_xpk.sh", *UP_GKE).returncode == 2
  away = "!1 error: You must be logged in to the server (Unauthorized)"
  cloud.answer(
    f"--filter-by-job => {away}",
    f"--ignore-not-found b3o-1 => {away}",
    *[jobset("b3o-1", "b3o-1 ")] * 2,
    f"--wait-for-job-completion=b3o-1 => {away}",
    jobset("b3o-1", "b3o-1 "),
    jobset("b3o-1", "b3o-1 Failed"),
    f"pods b3o-1 => {away}",
    pods("b3o-1", "75"),
    jobset("b3o-2"),
    jobset("b3o-2", "b3o-2 Completed"),
  )
  done = cloud.run("gke_xpk.sh", *UP_GKE)
  assert done.returncode == 0, done.stderr
  assert submitted(cloud) == ["b3o-2"] and cloud.count("--wait-for-job-completion=b3o-1") == 2
  # kubectl is not asked before xpk has pointed it at the cluster.
  assert cloud.count("--filter-by-job") == cloud.count("kubectl") + 1


def test_a_gke_workload_that_was_deleted_or_refused_or_is_another_ends_the_launcher(cloud):
  cloud.answer(jobset("b3o-1", "b3o-1 "))
  done = cloud.run("gke_xpk.sh", *UP_GKE)
  assert done.returncode == 2 and "not submitted here" in done.stderr and submitted(cloud) == []
  assert cloud.run("gke_xpk.sh", "down", *CLUSTER).returncode == 2 and cloud.count("delete") == 0
  cloud.answer("always workload create => !1 no such image")
  done = cloud.run("gke_xpk.sh", *UP_GKE)
  assert done.returncode == 2 and "xpk did not submit b3o-1" in done.stderr
  cloud.answer(jobset("b3o-2"), jobset("b3o-2", "b3o-2 "), jobset("b3o-2"))
  done = cloud.run("gke_xpk.sh", *UP_GKE)
  assert done.returncode == 2 and "deleted" in done.stderr and submitted(cloud) == ["b3o-2"]


def test_a_pod_that_is_asked_to_stop_ends_with_the_status_of_the_job(cloud, tmp_path):
  """The command as xpk's container runs it: SIGTERM goes to the last child of a shell that waits for it."""
  done = cloud.run("gke_xpk.sh", *UP_GKE[:-3], "--dry-run", *UP_GKE[-3:])
  typed = [word for line in done.stdout.splitlines() for word in shlex.split(line)]
  (command,) = (word.removeprefix("--command=") for word in typed if word.startswith("--command="))
  job = tmp_path / "bin" / "blip3o"
  job.write_text(f"#!/bin/bash\ntrap 'exit 75' TERM\ntouch {tmp_path}/started\nwhile true; do sleep 0.02; done\n")
  job.chmod(0o755)
  pod = subprocess.Popen(
    ["bash", "-c", f"trap 'kill $!' TERM; ({command}) & PID=$!; while kill -0 $PID; do sleep 0.05; done; wait $PID"],
    env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  try:
    while not (tmp_path / "started").exists():
      time.sleep(0.02)
    pod.terminate()
    assert pod.wait(20) == 75
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(pod.pid, signal.SIGKILL)


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


@pytest.fixture
def checkout(tmp_path):
  """What local.sh needs of a checkout, in a folder with a blank in its name, without a network line."""
  home = tmp_path / "a b"
  (home / "launch").mkdir(parents=True)
  for name in ("setup.py", "launch/local.sh"):
    shutil.copy(ROOT / name, home / name)
  return home


def local(home, **env):
  env = os.environ | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""} | env
  words = ["bash", str(home / "launch" / "local.sh"), "--version"]
  return subprocess.run(words, cwd="/", capture_output=True, text=True, env=env, timeout=60)


def stand_in(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)
  return path


def test_local_takes_a_python_whose_path_has_a_blank(checkout):
  python = stand_in(checkout / "py dir" / "python", 'case "$*" in "-m venv"*) exit 7 ;; esac')
  done = local(checkout, PYTHON=str(python))
  assert f"installing into .venv with {python}" in done.stderr
  done = local(checkout, PYTHON=str(stand_in(python, "exit 1")))  # too old
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"tried: {python}." in done.stderr


def test_local_empties_no_environment_that_it_did_not_make(checkout):
  mine = checkout / ".venv" / "mine"
  mine.parent.mkdir()
  mine.touch()
  done = local(checkout)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(mine.parent) in done.stderr
  assert mine.exists() and not (checkout / ".venv.lock").exists()
  (checkout / ".venv.lock").touch()  # one that was cut off while it was made is made anew
  local(checkout, PYTHON=str(stand_in(checkout / "python", 'case "$*" in "-m venv --clear"*) rm .venv/mine ;; esac')))
  assert not mine.exists()


def test_local_runs_a_command_where_the_user_is(checkout):
  python = stand_in(checkout / ".venv" / "bin" / "python", 'echo "$PWD: $*"')
  made_for = f"{checkout} test\n{(checkout / 'setup.py').read_text()}"
  (python.parent.parent / "made_for").write_text(made_for)
  done = local(checkout, BLIP3O_EXTRAS="test")
  assert (done.returncode, done.stdout) == (0, "/: -m blip3o_jax --version\n"), done.stderr


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="becomes another user")
def test_local_says_where_it_cannot_write(checkout):
  with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to others
    os.chmod(folder, 0o755)
    script = shutil.copytree(checkout, Path(folder) / "a b") / "launch" / "local.sh"
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", str(script), "--version"]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, timeout=60)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr
