"""The programs of a job with abstract arrays: exactly what runs, lowered for devices that need not be here."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from blip3o_jax import objectives
from blip3o_jax.data import pipeline
from blip3o_jax.data.outputs import encode_png
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.inference import image as drawing
from blip3o_jax.models import flops, presets
from blip3o_jax.models.blip3o import Blip3o, Blip3oConfig
from blip3o_jax.models.flops import training_flops
from blip3o_jax.planning.topology import Topology
from blip3o_jax.porting.locate import open_model
from blip3o_jax.porting.preprocessor import default_preprocessor, open_pictures
from blip3o_jax.porting.source import abstract_params
from blip3o_jax.sharding import rules
from blip3o_jax.training import trainer
from blip3o_jax.training.feed import COUNTED
from blip3o_jax.types import Batch, Params

JOBS = ("train", "generate", "cache-features")


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of a job.

  Attributes:
    name: for messages; lower: () -> jax.stages.Lowered; arguments: its abstract arguments, with shardings.
    parameters: {component: tree} of all weights that lie on the chips meanwhile.
    flops: operations an image, {part: count}, without what rematerialisation repeats.
    again: operations an image that it repeats where it keeps no product (remat "full").
  """

  name: str
  lower: Callable[[], Any]
  arguments: Any
  parameters: Params
  flops: dict[str, float]
  again: float = 0.0


def place_of(job: str, where: Topology) -> Topology:
  """Where one program of a job runs: training is one on all chips; pictures and features (jobs.generate,
  jobs.cache_features) are drawn and computed by every host for itself, on its chips."""
  return where if job == "train" else where.host()


def of_a_process(config: ConfigDict, where: Topology, job: str) -> tuple[ConfigDict, Topology]:
  """What one program of a job does, its share of a batch, and its place.

  Raises:
    UserError: the batch does not divide over the hosts.
  """
  place = place_of(job, where)
  times = len(where.devices) // len(place.devices)
  if config.batch_size % times:
    raise UserError(f"batch_size {config.batch_size} does not divide over the {times} hosts of {where.name}")
  part = config.copy_and_resolve_references()
  part.batch_size = config.batch_size // times
  return part, place


def make_mesh(config: ConfigDict, where: Topology, job: str) -> Mesh:
  """The mesh of a program of a job on a topology. Raises UserError as sharding.mesh.make_mesh does."""
  parts = config.accumulate if job == "train" else 1
  return where.mesh(config.mesh.to_dict(), batch_size=config.batch_size, parts=parts)


def build(config: ConfigDict, mesh: Mesh, job: str) -> list[Program]:
  """The programs of a job on a mesh; a batch of `config.batch_size` images goes through each of them once.

  Raises:
    UserError: an unknown job; an objective whose cost is not known.
  """
  if job not in JOBS:
    raise UserError(f"--for {job!r} is unknown; choose one of {', '.join(JOBS)}")
  return {"train": _train, "generate": _generate, "cache-features": _cache_features}[job](config, mesh)


# ---- training


def _train(config: ConfigDict, mesh: Mesh) -> list[Program]:
  program = trainer.build(config, mesh)
  batch = abstract_batch(config, program.model.cfg, mesh)
  arguments = program.state, program.frozen, batch

  def lower():
    with jax.set_mesh(mesh):
      return program.step.lower(*arguments)

  counts = training_parts(config, program.model.cfg, batch, set(program.state.trained))
  again = sum(one.flops for one in _passes(config, program.model.cfg, batch) if one.gradient)
  return [Program("step", lower, arguments, program.params, counts, again)]


def abstract_batch(config: ConfigDict, cfg: Blip3oConfig, mesh: Mesh) -> Batch:
  """A batch's shapes, dtypes and sharding: one made-up sample through the very builder that training uses."""
  groups, _ = pipeline.parse(config.data.to_dict())
  tokenizer = load_tokenizer(open_model("micro").tokenizer_dir())  # any one: lengths are the config's
  pictures = open_pictures(cfg, default_preprocessor(cfg))
  record = {"name": "a sample", "text": "a", "image": _white_png(), "conversations": _CONVERSATION}
  record["features"] = np.zeros((math.prod(cfg.dit.grid), cfg.dit.in_channels), jnp.bfloat16)  # if they are cached
  sharding, batches = rules.batch_sharding(mesh), {}
  for (name, data), rows in zip(groups.items(), pipeline.split_rows(groups, config.batch_size), strict=True):
    unseen = {"image": None} if data.task == "conversations" else {}  # its arrays have room for a picture anyway
    sample = pipeline.make_builder(data, tokenizer, pictures)(record | unseen)
    batches[name] = {
      key: jax.ShapeDtypeStruct((rows, *value.shape), value.dtype, sharding=sharding)
      for key, value in sample.items()
      if key not in COUNTED
    }
  return batches.get("", batches)


_CONVERSATION = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "a"}]


def _white_png() -> bytes:
  return encode_png(np.full((8, 8, 3), 255, np.uint8))


def training_parts(config: ConfigDict, cfg: Blip3oConfig, batch: Batch, trained: Collection[str]) -> dict[str, float]:
  """Operations of one example in a training step by part: what a component computes forward alone, and the rest of it.

  Raises:
    UserError: the objective does not say through which parts it goes.
  """
  parts: dict[str, float] = {}
  for one in _passes(config, cfg, batch):
    part = one.component if one.gradient else f"{one.component}, forward only"
    parts[part] = parts.get(part, 0.0) + training_flops([one], trained)
  return {part: count for part, count in parts.items() if count}


def _passes(config: ConfigDict, cfg: Blip3oConfig, batch: Batch) -> list[flops.Pass]:
  objective = objectives.get(config.objective)
  if not hasattr(objective, "passes"):
    raise UserError(f"objective {config.objective!r} has no passes(), so its cost is not known")
  return list(objective.passes(cfg, jax.tree.map(lambda x: x.shape, batch), config.objective_args.to_dict()))


# ---- inference


def _generate(config: ConfigDict, mesh: Mesh) -> list[Program]:
  """A picture from a prompt: features by the DiT, then pixels by the UNet and the VAE, as inference.model draws."""
  cfg = architecture(config)
  sampling = drawing.Sampling().changed(**config.sampling.to_dict())
  model, rows, side = Blip3o(cfg, dtype=jnp.bfloat16), rules.batch_sharding(mesh), math.isqrt(math.prod(cfg.dit.grid))
  b, length = config.batch_size, config.data.get("max_length", 128)
  array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((b, *shape), dtype, sharding=rows)
  keys = jax.ShapeDtypeStruct((b,), jax.random.key(0).dtype, sharding=rows)
  # All that a model directory holds is loaded; the encoder lies there for pictures in a prompt.
  params = abstract_params(cfg, ("backbone", "queries", "dit", "clip", "unet", "vae"), jnp.bfloat16, mesh)
  prompt = array(length, dtype=jnp.int32), array(length, dtype=jnp.bool_), array(3, length, dtype=jnp.int32)
  features = array(side**2, cfg.dit.in_channels)
  first, second = (model, params, *prompt, keys), (model, params, features, features, keys)
  text = flops.text_of(cfg.backbone)
  # Guidance doubles every step (an interval of it only some; the dearest case is counted).
  dit_calls = sampling.steps * (1 + (sampling.guidance != 1))
  unet_calls = sampling.decoder_steps * (1 + (sampling.decoder_guidance > 1))
  latent = cfg.image_size // cfg.vae.downsampling
  counts = {
    "backbone": flops.text_decoder(text, length) + flops.text_decoder(text, cfg.queries, cached=length),
    "DiT": dit_calls * flops.next_dit(cfg.dit, cfg.queries),
  }
  pixels = {
    "UNet": unet_calls * flops.denoiser(cfg.unet, latent, side**2),
    "VAE": flops.vae_decode(cfg.vae, cfg.image_size),
  }
  return [
    Program(
      "features", _lowering(mesh, drawing.draw_features, first, sampling.of_features()), first[1:], params, counts
    ),
    Program("pixels", _lowering(mesh, drawing.draw_pixels, second, sampling.of_pixels()), second[1:], params, pixels),
  ]


def _cache_features(config: ConfigDict, mesh: Mesh) -> list[Program]:
  """Pictures through the CLIP encoder."""
  cfg = architecture(config)
  model, size = Blip3o(cfg, dtype=jnp.bfloat16), cfg.clip.image_size
  params = abstract_params(cfg, ("clip",), jnp.bfloat16, mesh)
  shape = config.batch_size, size, size, 3
  arguments = model, params, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rules.batch_sharding(mesh))
  counts = {"encoder": flops.clip_encoder(cfg.clip)}
  return [Program("encode", _lowering(mesh, drawing.encode_features, arguments, {}), arguments[1:], params, counts)]


def architecture(config: ConfigDict) -> Blip3oConfig:
  """The model of an experiment."""
  return presets.get(config.model.preset, config.model.to_dict()["overrides"])


def _lowering(mesh: Mesh, jitted: Any, arguments: tuple, settings: dict[str, Any]) -> Callable[[], Any]:
  def lower():
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.RULES):
      return jitted.lower(*arguments, **settings)

  return lower
