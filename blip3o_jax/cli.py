"""The `blip3o` command (floor 8): parse, call, tell what went wrong. No logic.

Exit status: 0 done; 1 a check failed; 2 usage or input error, one line on stderr; 75 pre-empted, everything is saved.
What the commands do is in `commands`.
"""

import argparse
import ctypes
import errno
import glob
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from blip3o_jax import __version__, commands
from blip3o_jax.errors import CheckFailed, Preempted, Problems, UserError, out_of_memory

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
_AT_ONCE = "at once, in each process (default 32; made to divide over its devices)"
_NO_SPACE = "No space left on device"
_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
_KEEP_MEMORY = {-4: 0, -1: -1, -8: 1}  # malloc.h: M_MMAP_MAX 0, M_TRIM_THRESHOLD the largest there is, M_ARENA_MAX 1
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")


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
  prepare_jax()
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
    if words := out_of_memory(error):
      return _told(words, EXIT_USAGE)
    raise
  finally:
    signal.signal(signal.SIGTERM, before)


def prepare_jax() -> None:
  """What JAX finds in its environment and process when it starts, where the user has not decided."""
  none = not any(map(glob.glob, _ACCELERATORS))
  # libtpu is the planner's compiler. Where it is installed JAX looks for a TPU, and it complains if there is none.
  if none and importlib.util.find_spec("libtpu"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  if not none and os.environ.get("JAX_PLATFORMS") != "cpu":
    return
  # On a CPU the XLA of jax 0.10 gives convolutions to a library that is slower than its own code: 1.1 to 1.3 times, and
  # up to 4 for the gradients of kernels (two cores; products are faster there). Another XLA, such as that of a TPU's
  # driver, may not know this flag, and would end the process.
  flags = os.environ.get("XLA_FLAGS", "")
  if importlib.metadata.version("jaxlib").startswith("0.10.") and _CONVOLUTIONS.partition("=")[0] not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_CONVOLUTIONS}".strip()
  # glibc gives a step's big temporaries back to the system, which zeroes them page by page for the next step. Kept, as
  # here, they took 48 s of system time down to 6.4 in 200 steps of configs/micro/decoder.py, for 1.22 times the memory.
  # With an accelerator the host allocates little.
  if hasattr(libc := ctypes.CDLL(None), "mallopt") and "GLIBC_TUNABLES" not in os.environ:
    for option, value in _KEEP_MEMORY.items():
      libc.mallopt(option, value)


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
  under = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
  _add_training(under)
  _add_talking(under)
  _add_proof(under)
  _add_data(_group(under, "data", "COMMAND", "Make and look at data."))
  _add_bench(_group(under, "bench", "NAME", "Measure."))
  _add_eval(_group(under, "eval", "BENCHMARK", "Score a model."))
  return parser


def _group(under, name: str, metavar: str, help: str):
  """A command that has commands of its own."""
  parser = _command(under, name, None, help)
  return parser.add_subparsers(dest=f"{name}_command", required=True, metavar=metavar, parser_class=_Parser)


def _command(under, name: str, call: Callable | None, help: str | None = None) -> argparse.ArgumentParser:
  """Its help is the docstring of what is called."""
  help = help or call.__doc__
  added = under.add_parser(name, help=help, description=help)
  added.set_defaults(call=call)
  return added


# ---- options of several commands


def _model(added: argparse.ArgumentParser) -> None:
  added.add_argument(
    "--model", required=True, metavar="DIR", help="a model directory, the release's layout, a hub id, or `micro`"
  )


def _loaded(added: argparse.ArgumentParser) -> None:
  """Of what draws or talks."""
  _model(added)
  added.add_argument(
    "--compile-cache", default=argparse.SUPPRESS, metavar="DIR", help="keeps compiled programs for the next start"
  )
  _fsdp(added)


def _fsdp(added: argparse.ArgumentParser) -> None:
  added.add_argument(
    "--fsdp",
    type=_positive,
    default=argparse.SUPPRESS,
    metavar="N",
    help="devices over which the weights are cut (default: whole on every device)",
  )


def _drawing(added: argparse.ArgumentParser, seed: int = 0) -> None:
  added.add_argument("--seed", type=_seed, default=seed, help=f"(default {seed})")
  added.add_argument("--guidance", type=float, default=argparse.SUPPRESS, help="(default: the model's own)")
  added.add_argument("--steps", type=_positive, default=argparse.SUPPRESS, help="(default: the model's own)")
  added.add_argument(
    "--set",
    action="append",
    default=[],
    type=_setting,
    metavar="NAME=VALUE",
    help="another setting of blip3o_jax.inference.image.Sampling, such as decoder_steps=20; may be given again",
  )


def _job(added: argparse.ArgumentParser, num: int) -> None:
  added.add_argument("--out", required=True, type=_local, metavar="DIR", help="of this job alone")
  added.add_argument("--num", type=_positive, default=num, help=f"pictures a prompt (default {num})")
  added.add_argument(
    "--batch-size", type=_positive, default=argparse.SUPPRESS, metavar="N", help=f"pictures {_AT_ONCE}"
  )


# ---- the commands


def _add_training(under) -> None:
  quickstart = _command(under, "quickstart", commands.quickstart)
  quickstart.add_argument("--workdir", type=_local, default=Path("runs/quickstart"), metavar="DIR")
  quickstart.add_argument("--from-scratch", action="store_true", help="train every part, not only queries and DiT")

  train = _command(under, "train", commands.train)
  train.add_argument("--config", required=True, type=_local, metavar="FILE", help="an experiment, configs/X.py")
  train.add_argument("--workdir", required=True, metavar="DIR", help="of this run alone; may be gs://...")
  train.add_argument("--profile", type=_positive, metavar="STEPS", help="trace that many steps into WORKDIR/profile")

  plan = _command(under, "plan", commands.plan)
  what = plan.add_mutually_exclusive_group(required=True)
  what.add_argument("--config", type=_local, metavar="FILE", help="an experiment, configs/X.py")
  what.add_argument("--table", type=_local, metavar="DIR", help="the README's table, kept cell by cell in DIR")
  plan.add_argument("--topology", metavar="NAME", help="GENERATION:SHAPE in chips, e.g. v5e:16x16, v4:4x4x4")
  plan.add_argument("--slices", type=_positive, default=1, metavar="N", help="so many of them (default 1)")
  plan.add_argument("--for", dest="job", default="train", choices=("train", "generate", "cache-features"))
  plan.add_argument("--search", action="store_true", help="try batches, meshes and remat; compile the best three")
  plan.add_argument("--json", action="store_true", help="print the plan as JSON")
  plan.add_argument("--cells", nargs="+", default=[], metavar="CELL", help="with --table: these cells or rows alone")


def _add_talking(under) -> None:
  generate = _command(under, "generate", commands.generate)
  _loaded(generate)
  prompts = generate.add_mutually_exclusive_group(required=True)
  prompts.add_argument("--prompt", nargs="+", metavar="TEXT")
  prompts.add_argument(
    "--prompts", type=_local, metavar="FILE.jsonl", help='rows of {"prompt": TEXT}, perhaps with "seed" and "image"'
  )
  _job(generate, 4)
  _drawing(generate)

  edit = _command(under, "edit", commands.edit)
  _loaded(edit)
  edit.add_argument("--image", required=True, nargs="+", type=_there, metavar="FILE")
  edit.add_argument("--instruction", default="", metavar="TEXT", help="(default: reconstruct, as the release does)")
  edit.add_argument("--out", required=True, type=_local, metavar="DIR", help="gets NAME-edited.png")
  _drawing(edit)

  chat = _command(under, "chat", commands.chat)
  _loaded(chat)
  chat.add_argument("--image", nargs="+", default=[], type=_there, metavar="FILE", help="of the first turn")
  chat.add_argument(
    "--prompt", nargs="+", metavar="TEXT", help="a turn each (default: lines of standard input; /help says more)"
  )
  chat.add_argument("--out", type=_local, metavar="DIR", help="of the pictures that /draw draws (default: here)")
  chat.add_argument("--seed", type=_seed, default=0, help="of answers with a temperature and of pictures (default 0)")
  chat.add_argument(
    "--max-new-tokens", type=_positive, default=argparse.SUPPRESS, metavar="N", help="of an answer (default 1024)"
  )
  chat.add_argument("--temperature", type=float, default=argparse.SUPPRESS, help="(default 0: greedy)")
  chat.add_argument("--top-p", type=float, default=argparse.SUPPRESS, help="(default 1: of all words)")
  chat.add_argument("--top-k", type=_count, default=argparse.SUPPRESS, help="(default 0: of all words)")

  reconstruct = _command(under, "reconstruct", commands.reconstruct)
  _loaded(reconstruct)
  reconstruct.add_argument("--image", required=True, type=_there, metavar="FILE")
  reconstruct.add_argument("--out", required=True, type=_local, metavar="DIR", help="gets NAME-reconstructed.png")

  demo = _command(under, "demo", commands.demo)
  _loaded(demo)
  demo.add_argument("--host", default="127.0.0.1", help="(default 127.0.0.1: this machine alone; 0.0.0.0: the network)")
  demo.add_argument("--port", type=_port, default=7860, help="(default 7860; 0: a free one, which is printed)")


def _add_proof(under) -> None:
  convert = _command(under, "convert", commands.convert)
  convert.add_argument(
    "--from",
    dest="source",
    required=True,
    nargs="+",
    metavar="DIR",
    help="anything that --model takes; of several, each part comes from the first that has it",
  )
  convert.add_argument("--to", required=True, metavar="DIR", help="may be gs://...")
  convert.add_argument(
    "--format",
    choices=("orbax", "safetensors"),
    help="safetensors: the layout of the release; orbax: a model directory of Orbax trees (default: a model directory)",
  )
  convert.add_argument("--part", help="with --format safetensors: this part alone, as its own library loads it")
  convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as it is)")

  verify = _command(under, "verify", commands.verify)
  verify.add_argument("fixtures", nargs="+", type=_local, metavar="FIXTURE_DIR")
  verify.add_argument("--json", action="store_true", help="print the result as JSON")

  doctor = _command(under, "doctor", commands.doctor)
  doctor.add_argument("--model", default="micro", metavar="DIR", help="what trains and draws (default micro)")
  doctor.add_argument("--out", type=_local, metavar="DIR", help="gets doctor.json and a picture, to share")
  doctor.add_argument("--recordings", nargs="+", type=_local, metavar="DIR", help="(default: those of a checkout)")


def _add_data(under) -> None:
  shapes = _command(under, "make-shapes", commands.make_shapes)
  shapes.add_argument("--out", required=True, type=_local, metavar="DIR")
  shapes.add_argument("--seed", type=int, default=0)
  for size in ("contrastive", "pretrain", "instruct", "understanding", "text-only", "held-out"):
    shapes.add_argument(f"--{size}", type=_count, default=argparse.SUPPRESS, metavar="N")
  shapes.add_argument("--shard-size", type=_positive, default=argparse.SUPPRESS, metavar="N")
  cache = _command(under, "cache-features", commands.cache_features)
  _model(cache)
  _fsdp(cache)
  cache.add_argument(
    "--data", required=True, nargs="+", metavar="SHARDS", help="pictures with captions, as for training"
  )
  cache.add_argument("--out", required=True, type=_local, metavar="DIR", help="what data.path of a config then names")
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
  index = _command(under, "index", commands.index)
  index.add_argument("path", nargs="+", metavar="PATH", help="shards, folders or patterns, local or in a bucket")
  index.add_argument("--processes", type=_positive, default=os.cpu_count(), metavar="N")
  inspect = _command(under, "inspect", commands.inspect)
  what = inspect.add_mutually_exclusive_group(required=True)
  what.add_argument("path", nargs="?", metavar="PATH", help="shards or a .jsonl as they are")
  what.add_argument("--config", type=_local, metavar="FILE", help="an experiment: its samples as training builds them")
  inspect.add_argument("--num", type=_positive, default=argparse.SUPPRESS, help="samples (default 3; of a config 256)")
  inspect.add_argument(
    "--out", type=_local, default=Path("inspected"), metavar="DIR", help="of a config (default: here)"
  )

  caption = _command(under, "caption", commands.caption)
  caption.about = "blip3o_jax.jobs.caption"
  _loaded(caption)
  caption.add_argument("--data", required=True, metavar="PATH", help="tar shards of pictures, .jsonl, ..., or a folder")
  caption.add_argument("--out", required=True, type=_local, metavar="DIR", help="of this job alone")
  caption.add_argument("--style", choices=("long", "short"), default="long", help="(default long)")
  caption.add_argument("--prompt", metavar="TEXT", help="ask this (default: what the style asks)")
  caption.add_argument(
    "--batch-size", type=_positive, default=argparse.SUPPRESS, metavar="N", help=f"pictures {_AT_ONCE}"
  )


def _add_bench(under) -> None:
  def measure(name, call, help=None):
    added = _command(under, name, call, help)
    added.add_argument("--out", type=_local, metavar="FILE.json")
    return added

  def sized(added, batch, rounds):
    added.add_argument("--preset", choices=("4b", "8b"), default="", help="the real sizes (default: some for a CPU)")
    for option, text in (("batch-size", f"(default {batch})"), ("rounds", f"timed calls (default {rounds})")):
      added.add_argument(f"--{option}", type=_positive, default=argparse.SUPPRESS, metavar="N", help=text)
    return added

  def beside(added):
    added.add_argument("--vs", choices=("torch",), default="", help="beside the release's own building blocks")

  beside(sized(measure("train-step", commands.bench_train_step), 4, 4))
  loading = measure("data", commands.bench_data)
  loading.add_argument("--processes", type=_positive, default=2, metavar="N", help="measure with 1 and N (default 2)")
  for name, help in (
    ("dit", "The diffusion transformer, forward, and forward and backward."),
    ("backbone", "The language model: prompts and queries to the condition."),
    ("encoder", "The CLIP encoder: pictures to pooled features."),
    ("decoder", "A step of the UNet, and the VAE's decoding."),
    ("generate", "Whole pictures, one and eight at once."),
    ("chat", "The first token, and tokens a second."),
    ("checkpoint", "Saving and restoring what trains, beside a plain copy."),
    ("convert", "The release's layout written and read, beside a plain copy."),
    ("all", "All of these parts."),
  ):
    part = sized(measure(name, commands.bench_parts, help), "2; of a preset 8", 5)
    if name not in ("checkpoint", "convert"):
      beside(part)
  grown = measure("curves", commands.bench_curves)
  grown.add_argument("--preset", choices=("4b", "8b"), default="", help="the real sizes (default: some for a CPU)")


def _add_eval(under) -> None:
  shapes = _command(under, "shapes", commands.eval_shapes)
  _loaded(shapes)
  shapes.add_argument("--out", required=True, type=_local, metavar="DIR")
  shapes.add_argument("--split", choices=("heldout", "seen"), default="heldout", help="(default heldout)")
  shapes.add_argument("--num", type=_positive, default=4, help="pictures a prompt (default 4)")
  shapes.add_argument("--seed", type=_seed, default=0, help="(default 0)")
  shapes.add_argument("--limit", type=_positive, metavar="N", help="this many prompts only")
  shapes.add_argument(
    "--questions", type=_local, metavar="DIR", help="understanding/ of a corpus: ask its held-out ones too"
  )
  for name, num, takes in (
    ("geneval", 4, "evaluation_metadata.jsonl"),
    ("dpg", 4, "the folder dpg_bench/prompts"),
    ("wise", 1, "a file of its data, or the folder of them"),
    ("mjhq", 1, "meta_data.json"),
  ):
    added = _command(under, name, commands.eval_folder, f"Draw the folder that the scorer of {name} reads.")
    added.about = f"blip3o_jax.evaluation.{name}"  # its docstring says how to score
    _loaded(added)
    added.add_argument("--prompts", required=True, type=_local, metavar="PATH", help=f"the benchmark's own: {takes}")
    _job(added, num)
    _drawing(added, seed=42)
  understanding = _command(under, "understanding", commands.eval_understanding)
  understanding.about = "blip3o_jax.evaluation.understanding"
  _loaded(understanding)
  understanding.add_argument("--tasks", required=True, metavar="TASK,TASK", help="as lmms-eval calls them")
  understanding.add_argument(
    "--batch-size", type=_positive, default=argparse.SUPPRESS, metavar="N", help="questions at once (default 16)"
  )
  understanding.add_argument("--limit", type=_positive, metavar="N", help="this many questions of each task only")
  understanding.add_argument("--out", metavar="DIR", help="of lmms-eval's own logs")


# ---- words


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


_count, _positive, _port, _seed = _whole(0), _whole(1), _whole(0, 65535), _whole(0, 2**32 - 1)


def _local(text: str) -> Path:
  """A path of this machine. Of `gs://bucket` pathlib would make a folder of its own, `gs:`."""
  if "://" in text:
    raise argparse.ArgumentTypeError(f"{text}: this needs a file system; mount the bucket and give the path there")
  return Path(text)


def _there(text: str) -> Path:
  """A picture that is there, which is known before weights are read."""
  if not (path := _local(text)).exists():
    raise argparse.ArgumentTypeError(f"{text}: no such image")
  return path


def _setting(text: str) -> tuple[str, object]:
  name, equals, value = text.partition("=")
  if not equals:
    raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
  try:
    return name, json.loads(value)
  except ValueError:
    return name, value
