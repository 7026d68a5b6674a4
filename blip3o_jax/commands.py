"""What the commands of `blip3o` do (floor 8): call, print. No logic. The words are parsed in `cli`; `--help` shows the
docstrings.

Every command imports what it needs when it runs, so that `--help` and a mistyped word answer at once.
"""

import argparse
import importlib
import os
import shlex
import signal
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

  options = {"num": args.num, "seed": args.seed, "settings": _settings(args)}
  options |= _given(args, "batch_size") | _loading(args)
  for path, prompt in draw_few(args.model, args.prompt, args.out, **options):
    print(f"{path}  {prompt}", flush=True)


def eval_folder(args: argparse.Namespace) -> None:
  """Draw the folder that an official scorer reads."""
  _draw_all(args, importlib.import_module(f"blip3o_jax.evaluation.{args.eval_command}").Prompts)
  print(f"`blip3o eval {args.eval_command} --help` says how to score it")


def eval_understanding(args: argparse.Namespace) -> None:
  """Run lmms-eval on a model."""
  from blip3o_jax.evaluation import understanding

  options = {"limit": args.limit, "out": args.out} | _given(args, "batch_size") | _loading(args)
  understanding.run(args.model, args.tasks, **options)


def edit(args: argparse.Namespace) -> None:
  """Draw pictures anew by an instruction, as far as the model has learned to."""
  from blip3o_jax.data.outputs import encode_png, writable_folder, write_atomically
  from blip3o_jax.inference.model import load_here

  out, stems = writable_folder(args.out), [image.stem for image in args.image]
  if twice := [stem for stem in stems if stems.count(stem) > 1]:
    raise UserError(f"two pictures would both become {twice[0]}-edited.png; edit them into different folders")
  settings = _settings(args)
  drawn = load_here(args.model, **_loading(args)).edit(args.image, args.instruction, seed=args.seed, **settings)
  for stem, picture in zip(stems, drawn, strict=True):
    path = out / f"{stem}-edited.png"
    write_atomically(path, encode_png(picture))
    print(path)


def chat(args: argparse.Namespace) -> None:
  """Talk with a model, about pictures if there are any."""
  from blip3o_jax.apps.chat import chat
  from blip3o_jax.data.outputs import writable_folder
  from blip3o_jax.inference.model import load_here

  # A talk without a picture may be held where nothing can be written.
  out = writable_folder(args.out) if args.out else Path()
  settings = _given(args, "max_new_tokens", "temperature", "top_p", "top_k")
  chat(load_here(args.model, **_loading(args)), args.prompt, args.image, out, seed=args.seed, **settings)


def reconstruct(args: argparse.Namespace) -> None:
  """Draw a picture again from its CLIP features."""
  from blip3o_jax.data.outputs import encode_png, writable_folder, write_atomically
  from blip3o_jax.inference.model import load_here

  path = writable_folder(args.out) / f"{args.image.stem}-reconstructed.png"
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
  from blip3o_jax.data.outputs import writable_folder
  from blip3o_jax.planning import doctor

  out = args.out and writable_folder(args.out)
  doctor.run(args.model, out, args.recordings or doctor.default_recordings(), verification.replay)


def make_shapes(args: argparse.Namespace) -> None:
  """Write the corpora of the built-in world."""
  from blip3o_jax.data.shapes_corpus import make_shapes

  sizes = ("contrastive", "pretrain", "instruct", "understanding", "text_only", "held_out", "shard_size")
  print(make_shapes(args.out, seed=args.seed, **_given(args, *sizes)))


def cache_features(args: argparse.Namespace) -> None:
  """Compute the CLIP features of pictures once, to train from."""
  _start_job()
  from blip3o_jax.jobs import cache_features

  options = _given(args, "resize", "dtype", "fsdp", "batch_size", "shard_size", "threads")
  cache_features.run(args.model, args.data, args.out, **options)


def caption(args: argparse.Namespace) -> None:
  """Caption pictures by the model's own chat, into shards to train from."""
  _start_job()
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

  train_step.run(preset=args.preset, vs=args.vs, out=_file(args), **_given(args, "batch_size", "rounds"))


def bench_parts(args: argparse.Namespace) -> None:
  """Measure parts of the model and of the work around it."""
  from blip3o_jax.benchmarks import run

  names = list(run.CASES) if args.bench_command == "all" else [args.bench_command]
  options = _given(args, "vs", "batch_size", "rounds")
  run.run(names, preset=args.preset, out=_file(args), **options)


def bench_curves(args: argparse.Namespace) -> None:
  """Time against batch, depth, length and devices, as a plot with the slopes named."""
  from blip3o_jax.benchmarks import curves

  curves.run(preset=args.preset, out=_file(args))


def bench_data(args: argparse.Namespace) -> None:
  """The data pipeline against a plain loop over the same pictures."""
  from blip3o_jax.benchmarks import data

  for line in data.run(_file(args), processes=args.processes):
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
    **_loading(args),
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
  """The settings of drawing that were given; what is wrong with them is told before weights are read."""
  from blip3o_jax.inference.image import Sampling

  settings = _given(args, "guidance", "steps") | dict(args.set)
  Sampling().changed(**settings)
  return settings


def _given(args: argparse.Namespace, *names: str) -> dict:
  """Those of the options that were given: a default is written down once, in what is called."""
  return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _loading(args: argparse.Namespace) -> dict:
  """How the model is loaded."""
  return _given(args, "fsdp", "compile_cache")


def _file(args: argparse.Namespace) -> Path | None:
  """Where the figures go; that they can is known before anything is measured."""
  from blip3o_jax.data.outputs import writable_folder

  return args.out and writable_folder(args.out.parent) / args.out.name


def _start_jax() -> None:
  """On this machine or on all of a job, before anything touches a device. What is called here leaves that to it."""
  from blip3o_jax.sharding import distributed

  distributed.start()


def _start_job() -> None:
  """The same for what has nothing to save: each of several processes ends at SIGTERM as one alone does. JAX keeps the
  signal to itself for the trainer, which asks it at every step."""
  _start_jax()
  signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # ours is still the one that Python knows


def _draw_all(args: argparse.Namespace, prompts: Callable) -> None:
  _start_job()
  from blip3o_jax.jobs import generate

  options = _given(args, "batch_size") | _loading(args)
  settings = {"num": args.num, "seed": args.seed, "settings": _settings(args)}
  print(generate.run(args.model, prompts(args.prompts), args.out, **settings, **options))
