"""`blip3o doctor`: the first ten minutes on a new slice, GPU or CPU. Is everything right, and how fast is it?

Recordings of the reference, the attention kernel against plain attention, one training step, one picture, save and
restore; measured memory and time beside what the compiler planned. One page, and one JSON to share.
"""

import contextlib
import dataclasses
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import __version__
from blip3o_jax.checkpoints.store import Store
from blip3o_jax.data.outputs import encode_png, write_atomically
from blip3o_jax.errors import CheckFailed, UserError, told
from blip3o_jax.inference.model import load
from blip3o_jax.nn import attention as attending
from blip3o_jax.nn.target import target_platform
from blip3o_jax.planning import cost, hlo, programs, topology
from blip3o_jax.porting.locate import open_model
from blip3o_jax.sharding.mesh import make_mesh
from blip3o_jax.training import trainer
from blip3o_jax.training.defaults import complete, default_config

PROMPT = "a red circle"
QUICK = ("flow", "next_dit")  # on a CPU; all of them take it minutes, and `blip3o verify` replays them
# Errors of products rounded to bfloat16: eight bits, through tens of layers.
ROUNDED_BAR = 0.1
KERNEL_BARS = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclasses.dataclass
class Check:
  """One line of the page: what was looked at, whether it is right, and figures with their units in their names."""

  name: str
  ok: bool
  figures: dict[str, Any]
  note: str = ""


def run(model: str, out: Path | None, recordings: Sequence[Path], replay: Callable) -> None:
  """Run every check, print a line as each is done, and leave doctor.json and a picture in `out`.

  Args:
    model: what draws the picture and trains for a few steps.
    out: a folder, all processes' own or shared; a temporary one if None, which one process alone may have.
    recordings: directories with a fixture.json; replay: (directory, precision) -> lines, `verification.replay`.

  Raises:
    CheckFailed: a check did not hold. UserError: no folder for several processes.
  """
  if out is None and jax.process_count() > 1:
    raise UserError("doctor on several hosts needs --out DIR, a folder that all of them see")
  machine = _machine()
  say = print if jax.process_index() == 0 else lambda *_, **__: None
  say(" ".join(f"{key} {value};" for key, value in machine.items()).rstrip(";"), flush=True)
  checks: list[Check] = []
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch) if out is None else out
    config = training_config(model)
    # Training first: a device tells the most memory that was ever in use.
    for name, work in (
      ("training", lambda: training(config, folder)),
      ("picture", lambda: picture(model, folder)),
      ("recordings, float32", lambda: recorded(recordings, replay, "highest")),
      ("recordings, bfloat16", lambda: recorded(recordings, replay, "bfloat16")),
      ("attention kernel, float32", lambda: kernel("float32")),
      ("attention kernel, bfloat16", lambda: kernel("bfloat16")),
    ):
      for check in _tried(name, work):
        checks.append(check)
        say(line(check), flush=True)
    result = {"ok": all(c.ok for c in checks), "machine": machine, "model": model}
    result["checks"] = [dataclasses.asdict(c) for c in checks]
    if out is not None and jax.process_index() == 0:
      write_atomically(out / "doctor.json", (json.dumps(result, indent=1) + "\n").encode())
      say(out / "doctor.json")
  if wrong := [check.name for check in checks if not check.ok]:
    raise CheckFailed(f"doctor: {', '.join(wrong)} did not hold")
  say("all is well")


def _tried(name: str, work: Callable[[], list[Check]]) -> list[Check]:
  """The checks of `work`, or why there are none: a visit is to find out what a driver or a compiler refuses, and the
  rest is still to be looked at."""
  try:
    return work()
  except (UserError, OSError):
    raise
  except Exception as error:
    return [Check(name, False, {}, told(error))]


def default_recordings() -> list[Path]:
  """Those of a checkout, if this is one."""
  found = sorted(path.parent for path in Path("tests/golden").glob("*/fixture.json"))
  return [path for path in found if path.name in QUICK] if jax.default_backend() == "cpu" else found


def line(check: Check) -> str:
  """A check as one line."""
  shown = lambda v: f"{v:.3g}" if isinstance(v, float) else v
  figures = ", ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in check.figures.items())
  return f"{'ok  ' if check.ok else 'FAIL'} {check.name:<30} {figures} {check.note}".rstrip()


def _machine() -> dict[str, Any]:
  device = jax.local_devices()[0]
  return {
    "blip3o": __version__,
    "jax": jax.__version__,
    "python": platform.python_version(),
    "devices": f"{jax.device_count()} x {device.device_kind}",
    "driver": " ".join(device.client.platform_version.split()),
    "hosts": jax.process_count(),
    "date": datetime.date.today().isoformat(),
  }


# ---- the checks


def recorded(directories: Sequence[Path], replay: Callable, precision: str) -> list[Check]:
  """The recordings, with products in float32 ("highest") or rounded to bfloat16."""
  name = f"recordings, {'float32' if precision == 'highest' else precision}"
  if precision != "highest" and jax.default_backend() == "cpu":
    return [Check(name, True, {}, "left out: a CPU rounds no products, so it would be float32 again")]
  if not directories:
    return [Check(name, True, {}, "none at hand; --recordings tests/golden/* in a checkout")]
  bar = {"highest": None, "bfloat16": ROUNDED_BAR}[precision]
  worst, missed, start = 0.0, [], time.monotonic()
  for directory in directories:
    for found in replay(directory, precision):
      if found.error is not None:
        worst = max(worst, found.error)
        if found.status == "miss" if bar is None else not found.error <= bar:
          missed.append(f"{Path(directory).name}: {found.name}")
  figures = {"recordings": len(directories), "worst_error": worst, "seconds": time.monotonic() - start}
  return [Check(name, not missed, figures, "; ".join(missed[:3]))]


def kernel(dtype: str) -> list[Check]:
  """The attention kernel and its gradient against plain attention: cuDNN's on a GPU, else that for TPUs, on a CPU under
  the interpreter."""
  name, platform = f"attention kernel, {dtype}", target_platform()
  b, length, heads, size = (1, 256, 2, 32) if platform == "cpu" else (4, 1024, 8, 128)
  rng = np.random.default_rng(0)
  make = lambda n: jnp.asarray(rng.standard_normal((b, length, n, size)), dtype)
  q, k, v, weight = make(heads), make(heads // 2), make(heads // 2), make(heads)
  numbers = jnp.asarray(np.arange(length) > length // 3, jnp.int32)[None].repeat(b, 0)
  segments, settings = (numbers, numbers), {"causal": True, "scale": size**-0.5}
  if platform == "gpu":
    if not attending.cudnn_agrees((length, heads, size), (length, heads // 2, size), dtype, True, True):
      return [Check(name, True, {}, "left out: cuDNN does not take it here, so plain attention is used")]
    fast = lambda *x: attending.cudnn_attention(*x, segments, **settings)
  else:
    fast = lambda *x: attending.splash_attention(*x, segments, interpret=platform == "cpu", **settings)
  plain = lambda *x: attending.plain_attention(
    *x, attending.dense_mask(q, k, None, True, segments), scale=settings["scale"]
  )

  def measured(f):
    go = jax.jit(jax.value_and_grad(lambda *x: jnp.sum((f(*x) * weight).astype(jnp.float32)), (0, 1, 2)))
    jax.block_until_ready(go(q, k, v))
    start = time.monotonic()
    result = jax.block_until_ready(go(q, k, v))
    return result, time.monotonic() - start

  # Full products for float32; the kernel takes no others for bfloat16 than its own.
  with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
    (ours, seconds), (theirs, plain_seconds) = measured(fast), measured(plain)
  error = max(_error(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
  figures = {"error": error, "seconds": seconds, "plain_seconds": plain_seconds}
  note = "(interpreted)" if platform == "cpu" else ""
  return [Check(name, error <= KERNEL_BARS[dtype], figures, note)]


def _error(ours: jax.Array, theirs: jax.Array) -> float:
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-6))


def training_config(model: str):
  """Pretraining of `model` on a few made-up samples for each device."""
  source, config = open_model(model), default_config()
  cfg = source.config()
  config.model = {"preset": source.preset, "overrides": source.overrides}
  config.init_from, config.steps = model, 3
  config.batch_size = 8 * jax.device_count()
  config.data = {"task": "generation", "path": "made up", "image_size": cfg.clip.image_size, "max_length": 64}
  return complete(config)


def training(config, folder: Path) -> list[Check]:
  """A few steps of the real trainer's program on made-up data, then save and restore; measured beside planned."""
  mesh = make_mesh(config.mesh, batch_size=config.batch_size)
  with jax.set_mesh(mesh):
    program = trainer.build(config, mesh)
    params = trainer.initial_params(config, program, program.params, say=lambda *_: None)
    train_state, frozen = trainer.fresh_state(program, params)
    del params
    shapes = programs.abstract_batch(config, program.model.cfg, mesh)
    batch = {key: _made_up(key, x) for key, x in shapes.items()}
    start = time.monotonic()
    compiled = program.step.lower(train_state, frozen, batch).compile()
    compile_seconds, losses, seconds = time.monotonic() - start, [], []
    for _ in range(config.steps):
      start = time.monotonic()
      train_state, scalars = compiled(train_state, frozen, batch)
      losses.append(float(scalars["loss"]))
      seconds.append(time.monotonic() - start)
    figures = {"loss": losses[-1], "seconds": min(seconds), "compile_seconds": compile_seconds}
    figures |= _beside_plan(compiled, config, program, batch, mesh, min(seconds))
    right = all(map(np.isfinite, losses)) and int(train_state.skipped) == 0
    return [Check("training step", right, figures), _saved(train_state, program.state, folder)]


def _made_up(key: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
  """Random pictures, small token numbers, every token real; the same on every process."""
  rng = np.random.default_rng(0)
  whole = np.ones(shape.shape, bool) if shape.dtype == bool else rng.integers(0, 100, shape.shape).astype(shape.dtype)
  return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: whole[index])


def _beside_plan(compiled, config, program, batch, mesh, seconds: float) -> dict[str, Any]:
  """What the compiler said of this very step, and what was measured, where the device tells."""
  figures = {"planned_MiB": cost.memory_of(compiled).peak / 2**20}
  with contextlib.suppress(Exception):  # not every device counts its memory
    figures["peak_MiB"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20
  parts = programs.training_parts(config, program.model.cfg, batch, set(program.state.trained))
  count = sum(parts.values()) * config.batch_size / mesh.size
  figures["Gflop_per_s_and_device"] = count / seconds / 1e9
  chip = next((c for c in topology.CHIPS.values() if c.kind == jax.devices()[0].device_kind), None)
  if chip is not None:
    text = compiled.as_text()
    bounds = cost.bounds(chip, count, hlo.hbm_bytes(text), hlo.collectives(text, mesh))
    figures |= {"bound_seconds": bounds.seconds, "share_of_bound": bounds.seconds / seconds}
  return figures


def _saved(train_state, abstract, folder: Path) -> Check:
  """The state through a real checkpoint and back, compared to the last bit."""
  count = sum(x.nbytes for x in jax.tree.leaves(train_state))
  with Store(folder / "doctor_checkpoint") as store:
    step = (store.latest() or 0) + 1  # a folder of an earlier visit
    start = time.monotonic()
    store.save(step, train_state, {}, insist=True)
    saved, start = time.monotonic() - start, time.monotonic()
    back, _ = store.restore(step, abstract)
    jax.block_until_ready(back)
    restored = time.monotonic() - start
  same = jax.jit(lambda a, b: jnp.all(jnp.asarray([jnp.array_equal(x, y) for x, y in zip(a, b, strict=True)])))
  right = bool(same(jax.tree.leaves(train_state), jax.tree.leaves(back)))
  figures = {"MiB": count / 2**20, "save_seconds": saved, "restore_seconds": restored}
  return Check("save and restore", right, figures)


def picture(name: str, folder: Path) -> list[Check]:
  """A picture drawn with all steps: right if it is no plain surface. The second one is timed."""
  model = load(name)
  model.generate([PROMPT], num=1, seed=0)
  start = time.monotonic()
  pixels = np.asarray(model.generate([PROMPT], num=1, seed=1)[0][0])
  seconds = time.monotonic() - start
  path = folder / "doctor.png"
  if jax.process_index() == 0:
    write_atomically(path, encode_png(pixels))
  contrast = float(pixels.std())
  return [Check(f"picture of {PROMPT!r}", contrast > 5, {"contrast": contrast, "seconds": seconds}, f"{path.name}")]
