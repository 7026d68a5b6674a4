"""What the commands of `blip3o` do (floor 8): call, print. No logic. The words are parsed in `cli`; `--help` shows the
docstrings.

Every command imports what it needs when it runs, so that `--help` and a mistyped word answer at once.
"""

import argparse
import importlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from blip3o_jax.errors import UserError


def quickstart(args: argparse.Namespace) -> None:
  """The main job in miniature, on this machine."""
  _start_jax()
  from blip3o_jax.apps import quickstart

  quickstart.run(args.workdir, args.from_scratch)


def train(args: argparse.Namespace) -> None:
  """Train one stage, or go on with it; --config.FIELD=VALUE changes a field."""
  from blip3o_jax.training.config import load_config

  profile = [f"--config.profile={args.profile}"] if args.profile else []
  config = load_config(args.config, [*args.overrides, *profile])  # a slip answers before jax starts
  _start_jax()
  from blip3o_jax.training.trainer import train

  words = ["blip3o", "train", "--config", args.config.as_posix(), "--workdir", args.workdir, *args.overrides]
  train(config, args.workdir, command=shlex.join(words))


def plan(args: argparse.Namespace) -> None:
  """Does a job fit a TPU slice, and what bounds its speed? Compiles for it, without one."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays are abstract; a TPU of this machine is left alone
  if args.table:
    from blip3o_jax.planning import table

    return table.run(args.table, Path("configs"), args.cells)
  if not args.topology:
    raise UserError("plan --config needs --topology NAME, such as v5e:16x16")
  from blip3o_jax.training.config import load_config

  config = load_config(args.config, args.overrides)
  from blip3o_jax.planning import plan, search

  work = search.run if args.search else plan.run
  work(config, args.topology, slices=args.slices, job=args.job, as_json=args.json)


def generate(args: argparse.Namespace) -> None:
  """Draw pictures for prompts: a few by --prompt, to OUT/PROMPT-NUMBER.png; or a file of them by --prompts, on all
  hosts and devices, to OUT/pictures and OUT/manifest.jsonl: stopped, the same command goes on."""
  if args.prompts is not None:
    from blip3o_jax.jobs.generate import Rows

    return _draw_all(args, Rows)
  from blip3o_jax.jobs.generate import draw_few

  options = {"num": args.num, "seed": args.seed, "settings": _settings(args), **_loading(args)}
  for path, prompt in draw_few(args.model, args.prompt, args.out, **options):
    print(f"{path}  {prompt}", flush=True)


def eval_folder(args: argparse.Namespace) -> None:
  """Draw the folder that an official scorer reads."""
  _draw_all(args, importlib.import_module(f"blip3o_jax.evaluation.{args.eval_command}").Prompts)
  print(f"`blip3o eval {args.eval_command} --help` says how to score it")


def eval_understanding(args: argparse.Namespace) -> None:
  """Run lmms-eval on a model."""
  from blip3o_jax.evaluation import understanding

  understanding.run(args.model, args.tasks, batch_size=args.batch_size, limit=args.limit, out=args.out)


def edit(args: argparse.Namespace) -> None:
  """Draw pictures anew by an instruction, as far as the model has learned to."""
  from blip3o_jax.data.outputs import encode_png, write_atomically
  from blip3o_jax.inference.model import load_here

  edited = load_here(args.model, **_loading(args)).edit(args.image, args.instruction, seed=args.seed, **_settings(args))
  for image, picture in zip(args.image, edited, strict=True):
    path = args.out / f"{image.stem}-edited.png"
    write_atomically(path, encode_png(picture))
    print(path)


def chat(args: argparse.Namespace) -> None:
  """Talk with a model, about pictures if there are any."""
  from blip3o_jax.apps.chat import chat
  from blip3o_jax.inference.model import load_here

  settings = _given(args, "max_new_tokens", "temperature", "top_p", "top_k")
  chat(load_here(args.model, **_loading(args)), args.prompt, args.image, args.out, **settings)


def reconstruct(args: argparse.Namespace) -> None:
  """Draw a picture again from its CLIP features."""
  from blip3o_jax.data.outputs import encode_png, write_atomically
  from blip3o_jax.inference.model import load_here

  path = args.out / f"{args.image.stem}.png"
  write_atomically(path, encode_png(load_here(args.model, **_loading(args)).reconstruct(args.image)[0]))
  print(path)


def demo(args: argparse.Namespace) -> None:
  """Serve a web page to draw, talk and edit; needs pip install 'blip3o_jax[demo]'."""
  from blip3o_jax.apps import demo

  demo.run(args.model, args.host, args.port, **_loading(args))


def convert(args: argparse.Namespace) -> None:
  """Weights of the PyTorch release in, or out again."""
  from blip3o_jax.porting import locate

  for line in locate.convert_model(args.source, args.to, format=args.format, part=args.part, dtype=args.dtype):
    print(line)


def verify(args: argparse.Namespace) -> None:
  """Replay recorded reference activations; exit status 1 on any miss."""
  from blip3o_jax import verification

  verification.verify(args.fixtures, as_json=args.json)


def doctor(args: argparse.Namespace) -> None:
  """The first ten minutes on a new slice, GPU or CPU: is all right, how fast is it?"""
  _start_jax()
  from blip3o_jax import verification
  from blip3o_jax.planning import doctor

  doctor.run(args.model, args.out, args.recordings or doctor.default_recordings(), verification.replay)


def make_shapes(args: argparse.Namespace) -> None:
  """Write the corpora of the built-in world."""
  from blip3o_jax.data.shapes_corpus import make_shapes

  sizes = ("contrastive", "pretrain", "instruct", "understanding", "text_only", "held_out", "shard_size")
  print(make_shapes(args.out, seed=args.seed, **_given(args, *sizes)))


def cache_features(args: argparse.Namespace) -> None:
  """Compute the CLIP features of pictures once, to train from."""
  _start_jax()
  from blip3o_jax.jobs import cache_features

  options = _given(args, "resize", "dtype", "batch_size", "shard_size", "threads")
  cache_features.run(args.model, args.data, args.out, **options)


def caption(args: argparse.Namespace) -> None:
  """Caption pictures by the model's own chat, into shards to train from."""
  _start_jax()
  from blip3o_jax.jobs import caption

  options = _given(args, "batch_size") | _loading(args)
  print(caption.run(args.model, args.data, args.out, style=args.style, prompt=args.prompt, **options))


def index(args: argparse.Namespace) -> None:
  """Leave beside tar shards where their samples lie, for a fast start."""
  from blip3o_jax.data import tars

  for shard, samples in tars.index(args.path, args.processes):
    print(f"{shard}: {samples} samples", flush=True)


def inspect(args: argparse.Namespace) -> None:
  """What the model will see: pictures, prompts, tokens, bad samples, speed."""
  if args.config:
    from blip3o_jax.jobs import inspect_data
    from blip3o_jax.training.config import load_config

    lines = inspect_data.run(load_config(args.config, args.overrides), args.out, **_given(args, "num"))
  else:
    from blip3o_jax.data.inputs import describe

    lines = describe(args.path, **_given(args, "num"))
  for line in lines:
    print(line, flush=True)


def bench_train_step(args: argparse.Namespace) -> None:
  """A training step against that of the release's recipe."""
  from blip3o_jax.benchmarks import train_step

  train_step.run(preset=args.preset, vs=args.vs, out=args.out, **_given(args, "batch_size", "rounds"))


def bench_parts(args: argparse.Namespace) -> None:
  """Measure parts of the model and of the work around it."""
  from blip3o_jax.benchmarks import run

  names = list(run.CASES) if args.bench_command == "all" else [args.bench_command]
  run.run(names, preset=args.preset, vs=getattr(args, "vs", ""), out=args.out, **_given(args, "batch_size", "rounds"))


def bench_curves(args: argparse.Namespace) -> None:
  """Time against batch, depth, length and devices, as a plot with the slopes named."""
  _start_jax()
  from blip3o_jax.benchmarks import curves

  curves.run(preset=args.preset, out=args.out)


def bench_data(args: argparse.Namespace) -> None:
  """The data pipeline against a plain loop over the same pictures."""
  from blip3o_jax.benchmarks import data

  for line in data.run(args.out, processes=args.processes):
    print(line, flush=True)


def eval_shapes(args: argparse.Namespace) -> None:
  """Does it draw what prompts of the built-in world say?"""
  from blip3o_jax.evaluation import shapes

  score = shapes.run(
    args.model,
    args.out,
    split=args.split,
    num=args.num,
    seed=args.seed,
    questions_dir=args.questions,
    limit=args.limit,
  )
  print(f"{'family':<16} {'right':>6} {'control':>8}")
  for family, right in score.families.items():
    print(f"{family:<16} {right:6.3f} {score.control_families.get(family, 0.0):8.3f}")
  print(f"{'overall':<16} {score.overall:6.3f} {score.control:8.3f}")
  print(f"standard error {score.standard_error:.3f}, {score.pictures} pictures")
  for name, kinds in score.understanding.items():
    print(f"questions, {name}: " + ", ".join(f"{kind} {share:.3f}" for kind, share in kinds.items()))
  print(args.out / "scores.json")


# ---- inside


def _settings(args: argparse.Namespace) -> dict:
  """The settings of drawing that were given."""
  return _given(args, "guidance", "steps") | dict(args.set)


def _given(args: argparse.Namespace, *names: str) -> dict:
  """Those of the options that were given: a default is written down once, in what is called."""
  return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _loading(args: argparse.Namespace) -> dict:
  """How the model is loaded."""
  return _given(args, "fsdp", "compile_cache")


def _start_jax() -> None:
  """On this machine or on all of a job, before anything touches a device. What is called here leaves that to it."""
  from blip3o_jax.sharding import distributed

  distributed.start()


def _draw_all(args: argparse.Namespace, prompts: Callable) -> None:
  _start_jax()
  from blip3o_jax.jobs import generate

  options = _given(args, "batch_size") | _loading(args)
  settings = {"num": args.num, "seed": args.seed, "settings": _settings(args)}
  print(generate.run(args.model, prompts(args.prompts), args.out, **settings, **options))
