"""`blip3o quickstart`: the main job in miniature, on this machine, from data to pictures.

Leaves in WORKDIR: corpus/, stages/NAME/ (a training run each), model/ (a model directory), evaluation/, report.html and
grid.png. What is done is noted in quickstart.json: the same command again goes on where it stopped.
"""

import contextlib
import dataclasses
import io
import json
import os
import platform
import random
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import blip3o_jax
from blip3o_jax.apps import report
from blip3o_jax.apps.plots import read_curve
from blip3o_jax.data import shapes
from blip3o_jax.data.outputs import write_atomically
from blip3o_jax.data.shapes_corpus import make_shapes
from blip3o_jax.errors import CheckFailed, UserError
from blip3o_jax.evaluation import shapes as shapes_eval
from blip3o_jax.evaluation.shapes import FAMILIES, ShapesScore
from blip3o_jax.inference.model import load
from blip3o_jax.porting import convert, locate, model_dir
from blip3o_jax.training.config import load_config
from blip3o_jax.training.trainer import train

# The paper's stages in order, and what each trains.
STAGES = {
  "vae": "autoencoder, from nothing",
  "clip": "CLIP encoder, from nothing",
  "decoder": "decoder from CLIP features to pictures, from nothing",
  "understanding": "language model that sees, from nothing",
  "generation": "learnable queries and diffusion transformer, from nothing, the language model frozen",
  "instruct": "the same two, on instructions",
}
# What differs from configs/micro for twenty minutes on two CPU cores; --from-scratch takes these as they are. Short
# captions alone: long ones pay off later.
QUICK = {
  "generation": ("steps=1350", "schedule.warmup_steps=150", "data.path=runs/shapes/instruct", "data.max_length=40"),
  "instruct": ("steps=60", "data.max_length=40"),
}
UNUSED = ("contrastive", "pretrain", "understanding", "text_only")  # corpora
FROZEN = ("backbone", "clip", "unet", "vae")  # what a model trained by others brings along
SEEDS_PROMPT = "an orange circle and a purple square"
TRY_PROMPT = "a purple circle and an orange square"
QUESTIONS = 24  # asked before and after; the report shows the first few


@dataclasses.dataclass(frozen=True)
class Quickstart:
  """What a finished quickstart leaves behind. `micro` is None where the bundled model was not scored."""

  workdir: Path
  model_dir: Path
  report: Path
  score: ShapesScore
  micro: ShapesScore | None
  seconds: float
  peak_bytes: int


class Steps:
  """Named steps, each done once: `WORKDIR/quickstart.json` notes what is done and how long it took.

  A step that is cut off (an exception, Ctrl-C, a pre-emption) is done again; its time so far counts.
  """

  def __init__(self, workdir: Path, total: int, **settings: Any):
    self.path = workdir / "quickstart.json"
    self.total, self.number = total, 0
    self.record = json.loads(self.path.read_text()) if self.path.exists() else {"settings": settings, "steps": {}}
    if self.record["settings"] != settings:
      words = ", ".join(f"{key} {value}" for key, value in self.record["settings"].items())
      raise UserError(f"{workdir} was begun with {words}; run it that way again or give another --workdir")

  def run(self, name: str, note: str, work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)` unless it is done; what it returns (plain JSON values) is noted, and returned again later."""
    self.number += 1
    head = f"[{self.number}/{self.total}] {name}"
    past = self.record["steps"].get(name, {})
    if past.get("done"):
      print(f"{head}: done before, in {report.clock(past['seconds'])}", flush=True)
      return past["result"]
    print(f"{head}: {note}", flush=True)
    start, result, done = time.perf_counter(), None, False
    try:
      result = work(*args)
      done = True
    finally:
      seconds = past.get("seconds", 0.0) + time.perf_counter() - start
      peak = max(past.get("peak_bytes", 0), peak_memory())
      self.record["steps"][name] = {
        "done": done,
        "note": note,
        "seconds": seconds,
        "peak_bytes": peak,
        "result": result,
      }
      write_atomically(self.path, (json.dumps(self.record, indent=2) + "\n").encode())
    return result

  def times(self) -> list[tuple[str, str, float]]:
    """(name, note, seconds) of every step begun so far."""
    return [(name, step["note"], step["seconds"]) for name, step in self.record["steps"].items()]

  @property
  def peak_bytes(self) -> int:
    return max(step["peak_bytes"] for step in self.record["steps"].values())


def run(workdir: str | Path, from_scratch: bool = False) -> Quickstart:
  """Make the world, train, draw held-out prompts, score, and tell it in one page.

  The frozen parts come from the bundled `micro`; with `from_scratch` every part is trained here.

  Raises:
    UserError: `workdir` was begun another way, or a source checkout or the bundled model is missing.
    CheckFailed: the frozen language model is not what it was before training.
    Preempted: everything done is saved; run the same command again.
  """
  workdir = Path(workdir)
  names = tuple(STAGES) if from_scratch else ("generation", "instruct")
  compare = _has_micro()
  if not (compare or from_scratch):
    raise UserError("the bundled model `micro` is missing here; train every part yourself with --from-scratch")
  workdir.mkdir(parents=True, exist_ok=True)
  steps = Steps(workdir, total=7 + len(names) + (0 if from_scratch else 1) + compare, from_scratch=from_scratch)
  print(
    f"quickstart in {workdir}: {'every part' if from_scratch else 'queries and diffusion transformer'} from nothing"
  )

  # 1. The world.
  corpus = workdir / "corpus"
  sizes = {} if from_scratch else {"instruct": 24_000} | dict.fromkeys(UNUSED, 0)
  steps.run("corpus", "pictures and captions; held-out combinations appear in none", _corpus, corpus, sizes)
  questions = corpus / "understanding"

  # 2. The parts that the paper takes as given.
  source = workdir / "frozen" if not from_scratch else None
  if source:
    steps.run("frozen parts", f"{', '.join(FROZEN)}, taken from micro", _take_frozen, source)

  # 3. The stages, and a look at the language model before and after those that must not change it.
  for name in names:
    if name == "generation":
      before = steps.run("before", "what the language model is and answers", _look, source, questions)
    steps.run(name, STAGES[name], _train, workdir, name, source, () if from_scratch else QUICK[name])
    source = workdir / "stages" / name / "model"
  model = workdir / "model"
  steps.run("model", "the finished model directory", _copy, source, model)
  after = steps.run("after", "the same look again", _look, model, questions)
  for what in ("hash", "answers"):
    if before[what] != after[what]:
      raise CheckFailed(f"the frozen language model changed while it should not: {what} differ; see {steps.path}")

  # 4. What it draws.
  evaluation = workdir / "evaluation"
  steps.run("evaluation", "held-out prompts drawn, pixels judged", _evaluate, model, evaluation, questions)
  if compare:
    beside = workdir / "evaluation_micro"
    steps.run("micro", "the bundled model on the same prompts", _evaluate, "micro", beside, None)
  steps.run("samples", "two seeds of one prompt, reconstructions", _samples, model, workdir / "samples.npz")

  # 5. The page; always written anew.
  score = shapes_eval.read_score(evaluation / "scores.json")
  micro = shapes_eval.read_score(beside / "scores.json") if compare else None
  page = workdir / "report.html"
  shutil.copyfile(evaluation / "grid.png", workdir / "grid.png")
  seconds = sum(s for *_, s in steps.times())
  result = Quickstart(workdir, model, page, score, micro, seconds, steps.peak_bytes)
  print(f"[{steps.total}/{steps.total}] report: one page", flush=True)
  model_dir.annotate(model, provenance={"shapes": {"overall": score.overall, "control": score.control}})
  report.write(page, _page(result, steps, names, after, questions))
  _farewell(result, steps)
  return result


# ---- the steps


def _corpus(path: Path, sizes: dict[str, int]) -> None:
  make_shapes(path, **sizes)


def _train(workdir: Path, name: str, source: Path | None, overrides: Sequence[str]) -> None:
  """Train one stage to its end, on top of the model directory `source`."""
  config = load_config(config_file(name), overrides)
  # Absolute: the trainer goes on only where the config is the same, whatever directory the command is run in.
  corpus = (workdir / "corpus").resolve()
  config.data.path = str(corpus / Path(config.data.path).relative_to("runs/shapes"))
  with config.unlocked():
    config.init_from = str(source.resolve()) if source else ""
    config.tokenizer = "" if source else str(corpus / "tokenizer")  # later stages have that of their init_from
  train(config, workdir / "stages" / name)


def config_file(stage: str) -> Path:
  """configs/micro/STAGE.py.

  Raises:
    UserError: neither beside the package (a source checkout) nor inside it (an installation).
  """
  package = Path(blip3o_jax.__file__).resolve().parent
  for configs in (package.parent / "configs", package / "configs"):
    if (path := configs / "micro" / f"{stage}.py").is_file():
      return path
  raise UserError(f"no configs/micro/{stage}.py beside the package; run quickstart from a source checkout")


def _has_micro() -> bool:
  try:
    return bool(locate.find("micro"))
  except UserError:
    return False


def _take_frozen(target: Path) -> None:
  """A model directory with the given parts of micro alone, so that what is trained here really starts from nothing."""
  micro = locate.open_model("micro")
  model_dir.write(
    target,
    preset=micro.preset,
    overrides=micro.overrides,
    params=micro.read(FROZEN),
    tokenizer_dir=micro.tokenizer_dir(),
    preprocessor=micro.image_preprocessor(),
    sampling=micro.sampling,
  )


def _look(directory: Path, questions: Path) -> dict[str, Any]:
  """Content hash of the language model's weights as they lie on disk, and its answers to held-out questions."""
  _, weights = locate.open_model(directory).reference("backbone")
  asked = shapes_eval.read_questions(questions / "heldout.jsonl", QUESTIONS)
  answers = load(directory).answer([picture for picture, *_ in asked], [question for _, question, _ in asked])
  return {"hash": convert.content_hash(weights), "answers": answers}


def _copy(source: Path, target: Path) -> None:
  """The same model at another place."""
  model = locate.open_model(source)
  model_dir.write(target, preset=model.preset, overrides=model.overrides, params={}, carry_from=model)


def _evaluate(source: str | Path, out: Path, questions: Path | None) -> None:
  shapes_eval.run(source, out, questions_dir=questions)


def _samples(source: Path, path: Path) -> None:
  """Two seeds of one prompt, and pictures beside their reconstructions from CLIP features, to an npz."""
  model, rng = load(source), random.Random(0)
  # Whole batches: the programs that the evaluation compiled serve again, which is quicker than compiling smaller ones.
  prompts = [SEEDS_PROMPT] * (model.batch_size // 4)
  seeds = [model.generate(prompts, num=4, seed=seed)[0] for seed in (0, 1)]
  originals = [shapes.render(shapes.sample_scene(rng, family)) for family in FAMILIES]
  originals += [shapes.render(shapes.sample_scene(rng, family, held_out=True)) for family in FAMILIES[:4]]
  decoded = model.reconstruct((originals * model.batch_size)[: model.batch_size])[: len(originals)]
  buffer = io.BytesIO()
  np.savez_compressed(buffer, seeds=np.asarray(seeds), originals=np.asarray(originals), decoded=np.asarray(decoded))
  write_atomically(path, buffer.getvalue())


# ---- the telling


def _page(result: Quickstart, steps: Steps, names: Sequence[str], after: dict, questions: Path) -> report.Report:
  """Everything above, as the report wants it; reads only what the steps left on disk."""
  stored = json.loads((result.workdir / "evaluation" / "scores.json").read_text())
  asked = shapes_eval.read_questions(questions / "heldout.jsonl", QUESTIONS)
  with np.load(result.workdir / "samples.npz") as samples:
    seeds, pairs = samples["seeds"], list(zip(samples["originals"], samples["decoded"], strict=True))
  seconds = dict((name, s) for name, _, s in steps.times())
  training = sum(seconds[name] for name in names)
  scores = {"this run": result.score} | ({"micro, the bundled model": result.micro} if result.micro else {})
  facts = [
    (f"{100 * result.score.overall:.0f} %", f"of {result.score.pictures} pictures right"),
    (f"{100 * result.score.control:.0f} %", "by chance: other prompts"),
    (report.clock(training), "of training"),
    (f"{result.peak_bytes / 2**30:.1f} GiB", "of memory at most"),
  ]
  if result.micro:
    facts.insert(1, (f"{100 * result.micro.overall:.0f} %", "by the bundled model"))
  understood = stored["understanding"].get("heldout", {}).get("overall")
  frozen = f"The language model stayed frozen: same answers before and after, content hash {after['hash'][:12]}."
  what = "Every part" if len(names) > 2 else "Learnable queries and a diffusion transformer"
  return report.Report(
    title=f"A model that draws, trained in {report.clock(training)}",
    summary=(
      f"{what} learned here from nothing to turn the language model's hidden states into CLIP features, and those into"
      " pictures. It was asked for combinations that no stage of training had seen; a judge that only looks at pixels"
      " decided."
    ),
    facts=facts,
    scores=scores,
    drawings=_chosen(result.workdir / "evaluation", stored),
    drawings_note="the first prompts of each family, not picked; grid.png has all",
    seeds=[report.Drawing(SEEDS_PROMPT, list(pictures)) for pictures in seeds],
    reconstructions=pairs,
    answers=[report.Answer(p, q, a, t) for (p, q, t), a in zip(asked, after["answers"], strict=True)][:9],
    answers_note=frozen + (f" {100 * understood:.0f} % of held-out questions answered right." if understood else ""),
    curves=[read_curve(result.workdir / "stages" / name / "metrics.jsonl", name) for name in names],
    steps=steps.times(),
    commands=commands(result.model_dir),
    machine=machine(),
  )


def _chosen(evaluation: Path, stored: dict, each: int = 3) -> list[report.Drawing]:
  """The first `each` prompts of every family with their pictures."""
  count = dict.fromkeys(FAMILIES, 0)
  found = []
  for i, row in enumerate(stored["prompts"]):
    family = row["spec"]["family"]
    count[family] += 1
    if count[family] <= each:
      pictures = [shapes_eval.read_picture(evaluation / "pictures" / f"{i:03d}-{n}.png") for n in range(stored["num"])]
      found.append(report.Drawing(row["prompt"], pictures, row["right"], family))
  return found


def commands(model: Path) -> list[tuple[str, str]]:
  """What to try next: (what it does, command)."""
  name = shlex.quote(model.as_posix())
  return [
    ("Draw what you like", f'blip3o generate --model {name} --prompt "{TRY_PROMPT}" --out pictures'),
    (
      "Ask about a picture",
      f'blip3o chat --model {name} --image pictures/000-0.png --prompt "how many objects are there?"',
    ),
    ("Score it again", f"blip3o eval shapes --model {name} --out scores"),
    ("Through CLIP and back", f"blip3o reconstruct --model {name} --image pictures/000-0.png --out reconstructed"),
  ]


def machine() -> dict[str, str]:
  """Processor, accelerator and versions."""
  import flax
  import jax

  device = jax.devices()[0]
  return {
    "processor": f"{_processor()}, {os.cpu_count()} cores",
    "JAX devices": f"{jax.device_count()} x {device.device_kind}",
    "system": f"{platform.system()} {platform.machine()}",
    "Python": platform.python_version(),
    "versions": f"blip3o_jax {blip3o_jax.__version__}, jax {jax.__version__}, flax {flax.__version__}",
  }


def _processor() -> str:
  with contextlib.suppress(OSError):
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  return platform.processor() or platform.machine()


def peak_memory() -> int:
  """The most bytes this process has held in memory."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def score_table(result: Quickstart) -> Iterator[str]:
  """Lines of the score table: families down, this run, control and micro across."""
  columns = [("this run", result.score.families, result.score.overall)]
  columns.append(("control", result.score.control_families, result.score.control))
  if result.micro:
    columns.append(("micro", result.micro.families, result.micro.overall))
  yield " " * 15 + "".join(f"{name:>11}" for name, *_ in columns)
  for family in (*FAMILIES, "overall"):
    shares = [overall if family == "overall" else families.get(family) for _, families, overall in columns]
    yield f"{family:<15}" + "".join(f"{'-' if s is None else f'{100 * s:.0f} %':>11}" for s in shares)
  yield f"({result.score.pictures} pictures; overall +- {100 * result.score.standard_error:.0f} %)"


def _farewell(result: Quickstart, steps: Steps) -> None:
  print("\nwhere the time went")
  for name, _, seconds in steps.times():
    print(f"  {name:<15}{report.clock(seconds):>13}")
  print(f"  {'together':<15}{report.clock(result.seconds):>13}, {result.peak_bytes / 2**30:.1f} GiB of memory at most")
  print("\nheld-out prompts drawn right")
  for line in score_table(result):
    print(f"  {line}")
  print(f"\nreport    {result.report}\npictures  {result.workdir / 'grid.png'}\nmodel     {result.model_dir}")
  print("\nYour model is ready. Ask it for something:")
  print(f"  {commands(result.model_dir)[0][1]}", flush=True)
