"""`blip3o bench train-step`: our training step against the plain step of the release's recipe, on the same batches.

Plain: the CLIP encoder in every step, one backbone pass over prompt and queries with gradients through both, logits
over the vocabulary and the unused cross entropy (spec 3.2), padded to the full length. Ours: cached features, prefix
pass, no logits, length buckets. Both recompute activations, clip, and update by AdamW, and their losses must agree.

Sizes. The release's 8B with recomputation, per picture, in TFLOP: encoder 2 x 4.35 G x 1025 tokens and its attention
9.4; backbone 3 x 2 x 6.53 G x 256 tokens 10.0; DiT 4 x 2 x 1.365 G x 64 tokens 0.7. The default keeps the numbers of
tokens (1025, 192 + 64, 64) and makes the networks smaller: encoder 93 M parameters, backbone 160 M and 27 M of
vocabulary (13,184 x 1024 twice, so that logits keep their 3 % of the backbone), DiT 42 M. In GFLOP: 2 x 93 M x 1025 and
attention 22 x 4 x 1025^2 x 448, 233; 6 x 160 M x 256 and attention, 251; 8 x 31 M (what every token passes) x 64, 17.
That is 9.4 : 10.1 : 0.7. The figures printed are counted by models.flops.

Captions are drawn as in the release's data (spec 11.2): 31 of 36 long (about 120 tokens), 5 of 36 short (about 20). The
longest row of a batch decides its length, so buckets save little on this mixture.

`--preset 4b|8b` does the same at the real sizes, in bfloat16, with random weights, on the devices of one host. That has
not been run so far.
"""

import functools
import io
import itertools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from blip3o_jax import benchmarks
from blip3o_jax.benchmarks import sizes
from blip3o_jax.benchmarks.torch import rivals
from blip3o_jax.data import features, pipeline, tars
from blip3o_jax.data.features import Manifest
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.tokenizer import Tokenizer, load_tokenizer
from blip3o_jax.errors import CheckFailed, told
from blip3o_jax.inference import encoding
from blip3o_jax.models import flops
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.porting.locate import open_model
from blip3o_jax.sharding import rules
from blip3o_jax.sharding.mesh import make_mesh
from blip3o_jax.training import state, trainer
from blip3o_jax.training.defaults import complete, default_config
from blip3o_jax.training.feed import Buckets

_BUCKETS = (64, 128)
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the losses, relative


class Plain(Blip3o):
  """The model as the release runs it in training."""

  def query_states(self, tokens, mask, positions, *, prefix_pass=False):
    """See Blip3o. The cross entropy is computed and not trained on, as in the release; here it is added times zero."""
    b, length = tokens.shape
    q = self.cfg.queries
    start = jnp.max(jnp.where(mask[:, None], positions, -1), axis=-1, keepdims=True) + 1
    hidden = self.backbone.decode(
      jnp.concatenate([self.backbone.embed(tokens), self.latents(b)], axis=1),
      jnp.concatenate([positions, start + jnp.arange(q)], axis=-1),
      jnp.concatenate([mask, jnp.ones((b, q), bool)], axis=-1),
    ).hidden
    log_probs = jax.nn.log_softmax(self.backbone.logits(jax.lax.stop_gradient(hidden))[:, : length - 1])
    entropy = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    unused = jnp.sum(entropy * mask[:, 1:]) / jnp.sum(mask[:, 1:])
    return hidden[:, length:] + (0.0 * unused).astype(hidden.dtype)


def run(
  *,
  preset: str = "",
  batch_size: int = 4,
  rounds: int = 4,
  vs: str = "",
  out: Path | None = None,
) -> dict[str, Any]:
  """Compare, print and return the figures.

  Args:
    preset: "" for the sizes above, or a key of sizes.REAL.
    rounds: timed steps of each; every one takes another batch, the same for both.
    vs: "torch": the release's step by its own building blocks as well, eager and compiled.
    out: a JSON file of the figures.

  Raises:
    CheckFailed: the losses differ. UserError: no torch here.
  """
  if vs:
    rivals.require()
  config = _config(preset, batch_size)
  mesh = make_mesh({"data": 1, "fsdp": -1}, batch_size=batch_size)
  tokenizer = load_tokenizer(open_model("micro").tokenizer_dir())
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    pictures, cache = Path(folder, "pictures"), Path(folder, "features")
    plain_config = _with_data(config, task="generation", path=str(pictures), prefix_pass=False)
    ours_config = _with_data(config, task="features", path=str(cache), buckets=_BUCKETS)
    plain, ours = trainer.build(plain_config, mesh, Plain), trainer.build(ours_config, mesh)
    cfg = plain.model.cfg
    _write_pictures(pictures, count=batch_size * (rounds + 2), size=cfg.clip.image_size)
    params = trainer.initial_params(plain_config, plain, plain.params, say=lambda *_: None)
    caching = _Caching(cfg, params["clip"], mesh, pictures, cache, config.compute_dtype, batch_size)

    batches = _batches(plain_config, tokenizer, mesh, rounds + 2)
    compiled = plain.step.lower(plain.state, plain.frozen, batches[0]).compile()
    peaks = {"plain": benchmarks.peak_bytes(compiled)}
    copied = jax.tree.map(jnp.copy, {name: params[name] for name in plain.state.trained})  # a state keeps what it gets
    plain_run = _Run(compiled, *trainer.fresh_state(plain, params | copied), iter(batches))
    others = rivals.steps(plain_config, cfg, params, batches) if vs else {}

    batches = _batches(ours_config, tokenizer, mesh, rounds + 2)
    peaks["ours"] = benchmarks.peak_bytes(ours.step.lower(ours.state, ours.frozen, batches[0]).compile())
    cut = Buckets(iter(batches), _BUCKETS, rules.batch_sharding(mesh))
    step = cut.compile(ours, say=lambda *_: None)
    ours_run = _Run(step, *trainer.fresh_state(ours, params), cut)

    benchmarks.in_turn(1, plain_run, ours_run)  # warm-up
    others, broken = _running(others)
    *seconds, caching_seconds = benchmarks.in_turn(rounds, plain_run, ours_run, *others.values(), caching)
  losses = [[float(x) for x in one.losses] for one in (plain_run, ours_run, *others.values())]
  _check(losses, config.compute_dtype)
  (plain_seconds, ours_seconds, *other_seconds) = seconds
  figures = _figures(batch_size, plain_seconds, ours_seconds, caching_seconds, peaks) | {
    "others": _beside(others, ours_seconds, other_seconds),
    "broken": broken,
    "losses": losses,
    "lengths": ours_run.lengths,
    "parameters": state.count(plain.params),
    "flops": _parts(cfg, plain_config.data.max_length),
    "cache_bytes_a_picture": round(caching.report.bytes / caching.report.pictures),
  }
  _print(figures)
  return benchmarks.report(out, figures | (rivals.facts() if vs else {}))


class _Run:
  """One training step a call, its state kept inside."""

  def __init__(self, step, train_state, frozen, batches):
    self._step, self._state, self._frozen, self._batches = step, train_state, frozen, batches
    self.losses, self.lengths = [], []

  def __call__(self):
    batch = next(self._batches)
    self._state, scalars = self._step(self._state, self._frozen, batch)
    self.losses.append(scalars["loss"])
    self.lengths.append(batch["tokens"].shape[-1])
    return self._state, scalars


def _config(preset: str, batch_size: int) -> ConfigDict:
  config = default_config()
  config.steps, config.batch_size, config.remat = 1000, batch_size, "full"
  config.compute_dtype = sizes.dtype_of(preset)
  config.model = {"preset": sizes.REAL[preset]} if preset else {"preset": "blip3o-4b", "overrides": sizes.MID}
  return config


def _with_data(config: ConfigDict, *, prefix_pass: bool = True, **data) -> ConfigDict:
  config = ConfigDict(config.to_dict())
  architecture = trainer.presets.get(config.model.preset, config.model.to_dict().get("overrides"))
  config.data = {"max_length": 192, "image_size": architecture.clip.image_size, "form": "training"} | data
  config.objective_args = {"prefix_pass": prefix_pass}
  return complete(config)


def _write_pictures(folder: Path, count: int, size: int) -> None:
  """A shard of JPEGs and captions, always the same."""
  rng = np.random.default_rng(0)
  words = "a red green blue circle square triangle left right above below of and on the gray background".split()
  members = []
  for i in range(count):
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    picture = io.BytesIO()
    coarse.resize((size + 64, size), Image.Resampling.BICUBIC).save(picture, "JPEG", quality=90)
    length = max(5, round(rng.normal(20, 4) if rng.random() < 5 / 36 else rng.normal(120, 25)))
    caption = " ".join(rng.choice(words, length))
    members += [(f"{i:06d}.jpg", picture.getvalue()), (f"{i:06d}.txt", caption.encode())]
  tars.write(folder / "000.tar", members)


class _Caching:
  """What `blip3o data cache-features` does, with weights that lie in memory: all pictures, then a batch a call."""

  def __init__(self, cfg, clip, mesh, pictures: Path, cache: Path, dtype: str, batch_size: int):
    self._source, self._batch, self._again = open_source(str(pictures)), batch_size, cache / "again"
    self._squares = lambda rows: encoding.Squares(self._source, np.asarray(rows), cfg.clip.image_size, "crop")
    self._encode = encoding.make_encoder(cfg, {"clip": clip}, mesh, batch_size, dtype)
    encoder, shape, count = features.identity(None, cfg.clip, "crop"), encoding.feature_shape(cfg), len(self._source)
    manifest = Manifest(encoder, shape, dtype, [str(pictures)], count, count)
    manifest.write(cache)
    self.report = self._write([(cache / name, rows) for name, rows in manifest.shards], range(count))

  def __call__(self) -> None:
    self._write([(self._again, range(self._batch))], range(self._batch))

  def _write(self, shards, rows) -> encoding.Report:
    options = {"batch_size": self._batch, "threads": 2, "say": lambda *_: None}
    return encoding.write_shards(shards, self._squares(rows), self._encode, **options)


def _batches(config: ConfigDict, tokenizer: Tokenizer, mesh, count: int) -> list[dict[str, jax.Array]]:
  """The first batches of a run, on the devices."""
  loader = pipeline.make_loader(
    config.data.to_dict(), batch_size=config.batch_size, seed=config.seed, tokenizer=tokenizer
  )
  place = functools.partial(jax.device_put, device=rules.batch_sharding(mesh))
  keys = ("tokens", "token_mask", "positions", "pixels", "features")
  return [{k: place(v) for k, v in batch.items() if k in keys} for batch in itertools.islice(loader, count)]


def _check(losses: list[list[float]], dtype: str) -> None:
  plain, *others = np.asarray(losses)
  for other in others:
    if not (np.abs(other - plain) <= _TOLERANCE[dtype] * np.abs(plain)).all():
      raise CheckFailed(f"the steps give other losses, so no time is told: plain {plain}, another {other}")


def _running(others: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
  """Those that can take a first step, and why the rest cannot: no room on the GPU, no compiler for torch.compile."""
  able, broken = {}, {}
  for name, other in others.items():
    try:
      benchmarks.in_turn(1, other)
      able[name] = other
    except Exception as error:
      broken[name] = told(error)
  return able, broken


def _parts(cfg, max_length: int) -> dict[str, float]:
  """FLOPs of one picture in the plain step, recomputation counted, as in the module's docstring."""
  length = max_length + cfg.queries
  text = flops.text_of(cfg.backbone)
  return {
    "encoder": flops.clip_encoder(cfg.clip),
    "backbone": 3 * flops.text_decoder(text, length),
    "dit": 4 * flops.next_dit(cfg.dit, cfg.queries),
    "logits": flops.text_logits(text, length),
  }


def _figures(batch_size: int, plain: list[float], ours: list[float], caching: list[float], peaks) -> dict[str, Any]:
  speedup = [a / b for a, b in zip(plain, ours, strict=True)]
  twice = [2 * a / (2 * b + c) for a, b, c in zip(plain, ours, caching, strict=True)]
  plain, ours, caching = (benchmarks.spread(one) for one in (plain, ours, caching))
  return {
    "plain_seconds": plain,
    "ours_seconds": ours,
    "caching_seconds": caching,
    "images_per_s": {
      "plain": batch_size / plain["median"],
      "ours": batch_size / ours["median"],
      "ours_two_passes": 2 * batch_size / (2 * ours["median"] + caching["median"]),
    },
    "speedup": benchmarks.spread(speedup),
    "speedup_two_passes": benchmarks.spread(twice),
    "peak_bytes": peaks,
  }


def _beside(others: dict[str, Any], ours: list[float], seconds: list[list[float]]) -> dict[str, Any]:
  """Seconds of the other implementations, and how many times as fast ours is."""
  ratios = [[b / a for a, b in zip(ours, one, strict=True)] for one in seconds]
  return {
    name: {"seconds": benchmarks.spread(one), "ours_is_faster": benchmarks.spread(ratio)}
    for name, one, ratio in zip(others, seconds, ratios, strict=True)
  }


def _print(figures: dict[str, Any]) -> None:
  parts, rate, peaks = figures["flops"], figures["images_per_s"], figures["peak_bytes"]
  unit = 9.4 / parts["encoder"]
  ratio = " : ".join(f"{unit * parts[name]:.1f}" for name in ("encoder", "backbone", "dit"))
  print(
    f"{figures['parameters'] / 1e6:.0f} M parameters, encoder : backbone : DiT = {ratio}; lengths {figures['lengths']}"
  )
  losses = (" ".join(f"{loss:.5f}" for loss in step) for step in zip(*figures["losses"], strict=True))
  print(f"the same losses: {', '.join(losses)}")
  print(f"plain            {rate['plain']:8.3f} images/s  peak {peaks['plain'] / 2**30:6.2f} GiB")
  print(f"ours             {rate['ours']:8.3f} images/s  peak {peaks['ours'] / 2**30:6.2f} GiB")
  print(f"ours, two passes {rate['ours_two_passes']:8.3f} images/s, caching paid for")
  for name, words in (("speedup", "steady state"), ("speedup_two_passes", "two passes, caching paid for")):
    speed = figures[name]
    print(f"speed-up, {words}: {speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})")
  for name, other in figures["others"].items():
    speed, seconds = other["ours_is_faster"], other["seconds"]["median"]
    print(f"against {name}, {seconds:.2f} s a step: {speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})")
  for name, words in figures["broken"].items():
    print(f"against {name}: did not run: {words}")
  print(f"the cache takes {figures['cache_bytes_a_picture']:,} bytes a picture")
