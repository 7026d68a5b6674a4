"""The `blip3o` command (floor 8): parse, call, print. No logic.

Exit status: 0 done; 1 a check failed; 2 usage or input error, one line on stderr; 75 pre-empted, everything is saved.
Every command imports what it needs when it runs, so that `--help` and a mistyped word answer at once.
"""

import argparse
import errno
import importlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from blip3o_jax import __version__
from blip3o_jax.errors import CheckFailed, Preempted, Problems, UserError

EXIT_CHECK_FAILED, EXIT_USAGE, EXIT_PREEMPTED = 1, 2, 75  # 75 is EX_TEMPFAIL: run me again

# What the operating system refuses because of what it was asked to work on; the rest are bugs and keep their traceback.
_INPUT_ERRNOS = {
  errno.ENOENT,
  errno.EACCES,
  errno.EPERM,
  errno.EEXIST,
  errno.EISDIR,
  errno.ENOTDIR,
  errno.EROFS,
  errno.ENOSPC,
  errno.EDQUOT,
}
_NO_SPACE = "No space left on device"


def main(argv: Sequence[str] | None = None) -> int:
  """Run one command; returns the exit status. `argv` defaults to the words after the program's name."""
  parser = make_parser()
  # The words of `--config.a.b=value` are the experiment's own, so argparse cannot know them.
  args, rest = parser.parse_known_args(argv)
  args.overrides = [word for word in rest if word.startswith("--config.")] if hasattr(args, "config") else []
  if unknown := [word for word in rest if word not in args.overrides]:
    parser.error(f"unknown argument {unknown[0]}; `blip3o {args.command} --help` lists them")
  # Python's default ends at once, without the `finally` that removes half-written directories. The trainer puts its own
  # handler on top while it runs.
  before = signal.signal(signal.SIGTERM, _terminated)
  try:
    args.call(args)
    sys.stdout.flush()
    return 0
  except CheckFailed as error:
    return _told(error, EXIT_CHECK_FAILED)
  except UserError as error:
    return _told(error, EXIT_USAGE)
  except Preempted as error:
    return _told(error, EXIT_PREEMPTED)
  except BrokenPipeError:  # the reader has gone (`| head`): nobody to tell
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except KeyboardInterrupt:
    return _told("interrupted", 130)
  except Exception as error:
    if isinstance(error, OSError) and error.errno in _INPUT_ERRNOS:
      where = f"{error.filename}: " if error.filename else ""
      return _told(f"{where}{error.strerror}", EXIT_USAGE)
    if _NO_SPACE in str(error):  # checkpoint writers wrap the operating system's error in their own
      return _told(f"{_NO_SPACE}; free some and run the same command again", EXIT_USAGE)
    raise
  finally:
    signal.signal(signal.SIGTERM, before)


def _terminated(number, frame):
  raise Preempted("stopped by SIGTERM; run the same command again")


def _told(error: object, status: int) -> int:
  sys.stdout.flush()
  # One line, whatever some library wrote into the message; a list of problems has its own.
  text = str(error) if isinstance(error, Problems) else " ".join(str(error).split())
  print(f"blip3o: {text}", file=sys.stderr)
  return status


def make_parser() -> argparse.ArgumentParser:
  """The parser of every command; `args.call(args)` runs the chosen one."""
  parser = _Parser(prog="blip3o", description="BLIP3-o in JAX: train it, draw with it, ask it, prove it.")
  parser.add_argument("--version", action="version", version=__version__)
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

  def command(name, call, help, under=commands):
    added = under.add_parser(name, help=help, description=help)
    added.set_defaults(call=call)
    return added

  def model(added):
    added.add_argument(
      "--model", required=True, metavar="DIR", help="a model directory, the release's layout, a hub id, or `micro`"
    )
    added.add_argument(
      "--compile-cache", default=argparse.SUPPRESS, metavar="DIR", help="keeps compiled programs for the next start"
    )

  def drawing(added, seed=0):
    added.add_argument("--seed", type=int, default=seed, help=f"(default {seed})")
    added.add_argument("--guidance", type=float, default=argparse.SUPPRESS, help="(default: the model's own)")
    added.add_argument("--steps", type=_positive, default=argparse.SUPPRESS, help="(default: the model's own)")
    added.add_argument(
      "--set",
      action="append",
      default=[],
      type=_setting,
      metavar="NAME=VALUE",
      help="another setting of blip3o_jax.inference.image.Sampling, such as decoder_steps=20 or exact_times=true",
    )

  def job(added, num):
    added.add_argument("--out", required=True, type=Path, metavar="DIR", help="of this job alone")
    added.add_argument("--num", type=_positive, default=num, help=f"pictures a prompt (default {num})")
    added.add_argument(
      "--batch-size", type=_positive, default=argparse.SUPPRESS, metavar="N", help="pictures at once, in each process"
    )
    added.add_argument(
      "--fsdp", type=_positive, default=argparse.SUPPRESS, metavar="N", help="devices over which weights are cut"
    )

  quickstart = command("quickstart", _quickstart, "the main job in miniature, on this machine")
  quickstart.add_argument("--workdir", type=Path, default=Path("runs/quickstart"), metavar="DIR")
  quickstart.add_argument("--from-scratch", action="store_true", help="train every part, not only queries and DiT")

  train = command("train", _train, "train one stage, or go on with it; --config.FIELD=VALUE changes a field")
  train.add_argument("--config", required=True, type=Path, metavar="FILE", help="an experiment, configs/X.py")
  train.add_argument("--workdir", required=True, metavar="DIR", help="of this run alone; may be gs://...")
  train.add_argument("--profile", type=_positive, metavar="STEPS", help="trace that many steps into WORKDIR/profile")

  plan = command("plan", _plan, "does a job fit a TPU slice, and what bounds its speed? Compiles for it, without one")
  what = plan.add_mutually_exclusive_group(required=True)
  what.add_argument("--config", type=Path, metavar="FILE", help="an experiment, configs/X.py")
  what.add_argument("--table", type=Path, metavar="DIR", help="the README's table, kept cell by cell in DIR")
  plan.add_argument("--topology", metavar="NAME", help="GENERATION:SHAPE in chips, e.g. v5e:16x16, v4:4x4x4")
  plan.add_argument("--slices", type=_positive, default=1, metavar="N", help="so many of them (default 1)")
  plan.add_argument("--for", dest="job", default="train", choices=("train", "generate", "cache-features"))
  plan.add_argument("--search", action="store_true", help="try batches, meshes and remat; compile the best three")
  plan.add_argument("--json", action="store_true", help="print the plan as JSON")
  plan.add_argument("--cells", nargs="+", default=[], metavar="CELL", help="with --table: these cells or rows alone")

  generate = command(
    "generate",
    _generate,
    "draw pictures for prompts: a few by --prompt, to OUT/PROMPT-NUMBER.png; or a file of them by --prompts, on all "
    "hosts and devices, to OUT/pictures and OUT/manifest.jsonl: stopped, the same command goes on",
  )
  model(generate)
  prompts = generate.add_mutually_exclusive_group(required=True)
  prompts.add_argument("--prompt", nargs="+", metavar="TEXT")
  prompts.add_argument(
    "--prompts", type=Path, metavar="FILE.jsonl", help='rows of {"prompt": TEXT}, perhaps with "seed" and "image"'
  )
  job(generate, 4)
  drawing(generate)

  edit = command("edit", _edit, "draw pictures anew by an instruction, as far as the model has learned to")
  model(edit)
  edit.add_argument("--image", required=True, nargs="+", type=Path, metavar="FILE")
  edit.add_argument("--instruction", default="", metavar="TEXT", help="(default: reconstruct, as the release does)")
  edit.add_argument("--out", required=True, type=Path, metavar="DIR", help="gets NAME-edited.png")
  drawing(edit)

  chat = command("chat", _chat, "talk with a model, about pictures if there are any")
  model(chat)
  chat.add_argument("--image", nargs="+", default=[], type=Path, metavar="FILE", help="of the first turn")
  chat.add_argument(
    "--prompt", nargs="+", metavar="TEXT", help="a turn each (default: lines of standard input; /help says more)"
  )
  chat.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="of the pictures that /draw draws")
  chat.add_argument("--max-new-tokens", type=_positive, default=argparse.SUPPRESS, metavar="N")
  chat.add_argument("--temperature", type=float, default=argparse.SUPPRESS, help="(default 0: greedy)")
  chat.add_argument("--top-p", type=float, default=argparse.SUPPRESS)
  chat.add_argument("--top-k", type=_count, default=argparse.SUPPRESS)

  reconstruct = command("reconstruct", _reconstruct, "draw a picture again from its CLIP features")
  model(reconstruct)
  reconstruct.add_argument("--image", required=True, type=Path, metavar="FILE")
  reconstruct.add_argument("--out", required=True, type=Path, metavar="DIR")

  demo = command("demo", _demo, "serve a web page to draw, talk and edit; needs pip install 'blip3o_jax[demo]'")
  model(demo)
  demo.add_argument("--host", default="127.0.0.1", help="(default 127.0.0.1: this machine alone; 0.0.0.0: the network)")
  demo.add_argument("--port", type=_port, default=7860, help="(default 7860; 0: a free one, which is printed)")

  convert = command("convert", _convert, "weights of the PyTorch release in, or out again")
  convert.add_argument(
    "--from",
    dest="source",
    required=True,
    nargs="+",
    metavar="DIR",
    help="anything that --model takes; of several, each part comes from the first that has it",
  )
  convert.add_argument("--to", required=True, type=Path, metavar="DIR")
  convert.add_argument(
    "--format",
    choices=("orbax", "safetensors"),
    help="safetensors: the layout of the release; orbax: a model directory of Orbax trees (default: a model directory)",
  )
  convert.add_argument("--part", help="with --format safetensors: this part alone, as its own library loads it")
  convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as it is)")

  verify = command("verify", _verify, "replay recorded reference activations; exit status 1 on any miss")
  verify.add_argument("fixtures", nargs="+", type=Path, metavar="FIXTURE_DIR")
  verify.add_argument("--json", action="store_true", help="print the result as JSON")

  doctor = command("doctor", _doctor, "the first ten minutes on a new slice, GPU or CPU: is all right, how fast is it?")
  doctor.add_argument("--model", default="micro", metavar="DIR", help="what trains and draws (default micro)")
  doctor.add_argument("--out", type=Path, metavar="DIR", help="gets doctor.json and a picture, to share")
  doctor.add_argument("--recordings", nargs="+", type=Path, metavar="DIR", help="(default: those of a checkout)")

  data = command("data", None, "make and look at data").add_subparsers(
    dest="data_command", required=True, metavar="COMMAND", parser_class=_Parser
  )
  shapes = command("make-shapes", _make_shapes, "write the corpora of the built-in world", data)
  shapes.add_argument("--out", required=True, type=Path, metavar="DIR")
  shapes.add_argument("--seed", type=int, default=0)
  for size in ("contrastive", "pretrain", "instruct", "understanding", "text-only", "held-out", "shard-size"):
    shapes.add_argument(f"--{size}", type=_count, default=argparse.SUPPRESS, metavar="N")
  cache = command("cache-features", _cache_features, "compute the CLIP features of pictures once, to train from", data)
  model(cache)
  cache.add_argument(
    "--data", required=True, nargs="+", metavar="SHARDS", help="pictures with captions, as for training"
  )
  cache.add_argument("--out", required=True, type=Path, metavar="DIR", help="what data.path of a config then names")
  cache.add_argument("--resize", choices=("crop", "squash"), default=argparse.SUPPRESS, help="(default crop)")
  cache.add_argument(
    "--dtype", choices=("bfloat16", "float32"), default=argparse.SUPPRESS, help="computed and stored (default bfloat16)"
  )
  for option, text in (
    ("batch-size", "pictures at a time, a process (default 64)"),
    ("shard-size", "pictures a file (default 4096)"),
    ("threads", "that read and decode (default 8)"),
  ):
    cache.add_argument(f"--{option}", type=_positive, default=argparse.SUPPRESS, metavar="N", help=text)
  index = command("index", _index, "leave beside tar shards where their samples lie, for a fast start", data)
  index.add_argument("path", nargs="+", metavar="PATH", help="shards, folders or patterns, local or in a bucket")
  index.add_argument("--processes", type=_positive, default=os.cpu_count(), metavar="N")
  inspect = command("inspect", _inspect, "what the model will see: pictures, prompts, tokens, bad samples, speed", data)
  what = inspect.add_mutually_exclusive_group(required=True)
  what.add_argument("path", nargs="?", metavar="PATH", help="shards or a .jsonl as they are")
  what.add_argument("--config", type=Path, metavar="FILE", help="an experiment: its samples as training builds them")
  inspect.add_argument("--num", type=_positive, default=argparse.SUPPRESS, help="samples (default 3; of a config 256)")
  inspect.add_argument("--out", type=Path, default=Path("inspected"), metavar="DIR", help="of a config (default here)")

  caption = command("caption", _caption, "caption pictures by the model's own chat, into shards to train from", data)
  caption.about = "blip3o_jax.jobs.caption"
  model(caption)
  caption.add_argument("--data", required=True, metavar="PATH", help="tar shards, .jsonl, ..., or a folder of them")
  caption.add_argument("--out", required=True, type=Path, metavar="DIR", help="of this job alone")
  caption.add_argument("--style", choices=("long", "short"), default="long")
  caption.add_argument("--prompt", metavar="TEXT", help="ask this (default: what the style asks)")
  caption.add_argument("--batch-size", type=_positive, default=argparse.SUPPRESS, metavar="N")
  caption.add_argument("--fsdp", type=_positive, default=argparse.SUPPRESS, metavar="N")

  bench = command("bench", None, "measure").add_subparsers(
    dest="bench_command", required=True, metavar="NAME", parser_class=_Parser
  )

  def measure(name, call, help):
    added = command(name, call, help, bench)
    added.add_argument("--out", type=Path, metavar="FILE.json")
    return added

  def sized(added, batch, rounds):
    added.add_argument("--preset", choices=("4b", "8b"), default="", help="the real sizes (default: some for a CPU)")
    for option, text in (("batch-size", f"(default {batch})"), ("rounds", f"timed calls (default {rounds})")):
      added.add_argument(f"--{option}", type=_positive, default=argparse.SUPPRESS, metavar="N", help=text)
    return added

  sized(measure("train-step", _bench_train_step, "a training step against that of the release's recipe"), 4, 4)
  loading = measure("data", _bench_data, "the data pipeline against a plain loop over the same pictures")
  loading.add_argument("--processes", type=_positive, default=2, metavar="N", help="measure with 1 and N (default 2)")
  for name, help in (
    ("dit", "the diffusion transformer, forward, and forward and backward"),
    ("backbone", "the language model: prompts and queries to the condition"),
    ("encoder", "the CLIP encoder: pictures to pooled features"),
    ("decoder", "a step of the UNet, and the VAE's decoding"),
    ("generate", "whole pictures, one and eight at once"),
    ("chat", "the first token, and tokens a second"),
    ("checkpoint", "saving and restoring what trains, beside a plain copy"),
    ("convert", "the release's layout written and read, beside a plain copy"),
    ("all", "all of these parts"),
  ):
    part = sized(measure(name, _bench_parts, help), "2; of a preset 8", 5)
    if name not in ("checkpoint", "convert"):
      part.add_argument("--vs", choices=("torch",), default="", help="beside the release's own building blocks")

  evaluation = command("eval", None, "score a model").add_subparsers(
    dest="eval_command", required=True, metavar="BENCHMARK", parser_class=_Parser
  )
  shapes = command("shapes", _eval_shapes, "does it draw what prompts of the built-in world say?", evaluation)
  model(shapes)
  shapes.add_argument("--out", required=True, type=Path, metavar="DIR")
  shapes.add_argument("--split", choices=("heldout", "seen"), default="heldout")
  shapes.add_argument("--num", type=_positive, default=4, help="pictures a prompt (default 4)")
  shapes.add_argument("--seed", type=int, default=0)
  shapes.add_argument("--limit", type=_positive, metavar="N", help="this many prompts only")
  shapes.add_argument(
    "--questions", type=Path, metavar="DIR", help="understanding/ of a corpus: ask its held-out ones too"
  )
  for name, num, takes in (
    ("geneval", 4, "evaluation_metadata.jsonl"),
    ("dpg", 4, "the folder dpg_bench/prompts"),
    ("wise", 1, "a file of its data, or the folder of them"),
    ("mjhq", 1, "meta_data.json"),
  ):
    added = command(name, _eval_folder, f"draw the folder that the scorer of {name} reads", evaluation)
    added.about = f"blip3o_jax.evaluation.{name}"  # its docstring says how to score
    model(added)
    added.add_argument("--prompts", required=True, type=Path, metavar="PATH", help=f"the benchmark's own: {takes}")
    job(added, num)
    drawing(added, seed=42)
  understanding = command("understanding", _eval_understanding, "run lmms-eval on a model", evaluation)
  understanding.about = "blip3o_jax.evaluation.understanding"
  model(understanding)
  understanding.add_argument("--tasks", required=True, metavar="TASK,TASK", help="as lmms-eval calls them")
  understanding.add_argument("--batch-size", type=_positive, default=16)
  understanding.add_argument("--limit", type=_positive, metavar="N", help="this many questions of each task only")
  understanding.add_argument("--out", metavar="DIR", help="of lmms-eval's own logs")
  return parser


class _Parser(argparse.ArgumentParser):
  about: str | None = None  # a module whose docstring `--help` shows

  def __init__(self, **kwargs):
    super().__init__(**kwargs, allow_abbrev=False)  # `--num` must not be taken for a future `--num-hosts`

  def format_help(self) -> str:
    """With the docstring of `about`, as it is laid out, imported only now."""
    if self.about:
      self.formatter_class = argparse.RawDescriptionHelpFormatter
      self.description = importlib.import_module(self.about).__doc__
    return super().format_help()

  def error(self, message: str):
    """One line, as for every other input error (argparse would print the usage before it)."""
    self.exit(EXIT_USAGE, f"blip3o: {' '.join(message.split())}\n")


def _whole(low: int, high: float = float("inf")):
  def number(text: str) -> int:
    if not low <= (value := int(text)) <= high:
      raise argparse.ArgumentTypeError(f"{text} is {f'below {low}' if value < low else f'above {high}'}")
    return value

  return number


_count, _positive, _port = _whole(0), _whole(1), _whole(0, 65535)


def _setting(text: str) -> tuple[str, object]:
  name, equals, value = text.partition("=")
  if not equals:
    raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
  try:
    return name, json.loads(value)
  except ValueError:
    return name, value


def _settings(args: argparse.Namespace) -> dict:
  """The settings of drawing that were given."""
  return _given(args, "guidance", "steps") | dict(args.set)


def _given(args: argparse.Namespace, *names: str) -> dict:
  """Those of the options that were given: a default is written down once, in what is called."""
  return {name: getattr(args, name) for name in names if hasattr(args, name)}


# ---- the commands


def _start_jax():
  """On this machine or on all of a job, before anything touches a device. What is called here leaves that to it."""
  from blip3o_jax.sharding import distributed

  distributed.start()


def _quickstart(args):
  _start_jax()
  from blip3o_jax.apps import quickstart

  quickstart.run(args.workdir, args.from_scratch)


def _train(args):
  from blip3o_jax.training.config import load_config

  profile = [f"--config.profile={args.profile}"] if args.profile else []
  config = load_config(args.config, [*args.overrides, *profile])  # a slip answers before jax starts
  _start_jax()
  from blip3o_jax.training.trainer import train

  words = ["blip3o", "train", "--config", args.config.as_posix(), "--workdir", args.workdir, *args.overrides]
  train(config, args.workdir, command=shlex.join(words))


def _plan(args):
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


def _generate(args):
  if args.prompts is not None:
    from blip3o_jax.jobs.generate import Rows

    return _draw_all(args, Rows)
  from blip3o_jax.jobs.generate import draw_few

  options = {"num": args.num, "seed": args.seed, "settings": _settings(args), **_given(args, "compile_cache")}
  for path, prompt in draw_few(args.model, args.prompt, args.out, **options):
    print(f"{path}  {prompt}", flush=True)


def _draw_all(args, prompts):
  _start_jax()
  from blip3o_jax.jobs import generate

  options = _given(args, "batch_size", "fsdp", "compile_cache")
  settings = {"num": args.num, "seed": args.seed, "settings": _settings(args)}
  print(generate.run(args.model, prompts(args.prompts), args.out, **settings, **options))


def _eval_folder(args):
  _draw_all(args, importlib.import_module(f"blip3o_jax.evaluation.{args.eval_command}").Prompts)
  print(f"`blip3o eval {args.eval_command} --help` says how to score it")


def _eval_understanding(args):
  from blip3o_jax.evaluation import understanding

  understanding.run(args.model, args.tasks, batch_size=args.batch_size, limit=args.limit, out=args.out)


def _edit(args):
  from blip3o_jax.data.outputs import encode_png, write_atomically
  from blip3o_jax.inference.model import load

  model = load(args.model, **_given(args, "compile_cache"))
  edited = model.edit(args.image, args.instruction, seed=args.seed, **_settings(args))
  for image, picture in zip(args.image, edited, strict=True):
    path = args.out / f"{image.stem}-edited.png"
    write_atomically(path, encode_png(picture))
    print(path)


def _chat(args):
  from blip3o_jax.apps.chat import chat
  from blip3o_jax.inference.model import load

  settings = _given(args, "max_new_tokens", "temperature", "top_p", "top_k")
  chat(load(args.model, **_given(args, "compile_cache")), args.prompt, args.image, args.out, **settings)


def _reconstruct(args):
  from blip3o_jax.data.outputs import encode_png, write_atomically
  from blip3o_jax.inference.model import load

  path = args.out / f"{args.image.stem}.png"
  write_atomically(path, encode_png(load(args.model, **_given(args, "compile_cache")).reconstruct(args.image)[0]))
  print(path)


def _demo(args):
  from blip3o_jax.apps import demo

  demo.run(args.model, args.host, args.port, **_given(args, "compile_cache"))


def _convert(args):
  from blip3o_jax.porting import locate

  for line in locate.convert_model(args.source, args.to, format=args.format, part=args.part, dtype=args.dtype):
    print(line)


def _verify(args):
  from blip3o_jax import verification

  verification.verify(args.fixtures, as_json=args.json)


def _doctor(args):
  _start_jax()
  from blip3o_jax import verification
  from blip3o_jax.planning import doctor

  doctor.run(args.model, args.out, args.recordings or doctor.default_recordings(), verification.replay)


def _make_shapes(args):
  from blip3o_jax.data.shapes_corpus import make_shapes

  sizes = ("contrastive", "pretrain", "instruct", "understanding", "text_only", "held_out", "shard_size")
  print(make_shapes(args.out, seed=args.seed, **_given(args, *sizes)))


def _cache_features(args):
  _start_jax()
  from blip3o_jax.jobs import cache_features

  options = _given(args, "resize", "dtype", "batch_size", "shard_size", "threads")
  cache_features.run(args.model, args.data, args.out, **options)


def _caption(args):
  _start_jax()
  from blip3o_jax.jobs import caption

  options = _given(args, "batch_size", "fsdp", "compile_cache")
  print(caption.run(args.model, args.data, args.out, style=args.style, prompt=args.prompt, **options))


def _index(args):
  from blip3o_jax.data import tars

  for shard, samples in tars.index(args.path, args.processes):
    print(f"{shard}: {samples} samples", flush=True)


def _inspect(args):
  if args.config:
    from blip3o_jax.jobs import inspect_data
    from blip3o_jax.training.config import load_config

    lines = inspect_data.run(load_config(args.config, args.overrides), args.out, **_given(args, "num"))
  else:
    from blip3o_jax.data.inputs import describe

    lines = describe(args.path, **_given(args, "num"))
  for line in lines:
    print(line, flush=True)


def _bench_train_step(args):
  from blip3o_jax.benchmarks import train_step

  train_step.run(preset=args.preset, out=args.out, **_given(args, "batch_size", "rounds"))


def _bench_parts(args):
  from blip3o_jax.benchmarks import run

  names = list(run.CASES) if args.bench_command == "all" else [args.bench_command]
  run.run(names, preset=args.preset, vs=getattr(args, "vs", ""), out=args.out, **_given(args, "batch_size", "rounds"))


def _bench_data(args):
  from blip3o_jax.benchmarks import data

  for line in data.run(args.out, processes=args.processes):
    print(line, flush=True)


def _eval_shapes(args):
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
