"""The programs of a job with abstract arrays: exactly what runs, lowered for devices that need not be here."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from blip3o_jax.data import pipeline
from blip3o_jax.data.outputs import encode_png
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.inference import image as drawing
from blip3o_jax.models import flops, presets
from blip3o_jax.models.blip3o import Blip3o, Blip3oConfig
from blip3o_jax.models.flops import Pass, training_flops
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
  """

  name: str
  lower: Callable[[], Any]
  arguments: Any
  parameters: Params
  flops: dict[str, float]


def build(config: ConfigDict, mesh: Mesh, job: str) -> list[Program]:
  """The programs of a job on a mesh; a batch of `config.batch_size` images goes through each of them once.

  Raises:
    UserError: an unknown job; an objective or data task whose cost is not known here.
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

  trained = set(program.state.trained)
  passes = objective_passes(config, program.model.cfg, batch)
  counts = {part: training_flops([p], trained) for part, p in passes.items()}
  return [Program("step", lower, arguments, program.params, counts)]


def abstract_batch(config: ConfigDict, cfg: Blip3oConfig, mesh: Mesh) -> Batch:
  """A batch's shapes, dtypes and sharding: one made-up sample through the very builder that training uses."""
  groups, _ = pipeline.parse(config.data.to_dict())
  tokenizer = load_tokenizer(open_model("micro").tokenizer_dir())  # any one: lengths are the config's
  pictures = open_pictures(cfg, default_preprocessor(cfg))
  record = {"name": "a sample", "text": "a", "image": _white_png(), "conversations": _CONVERSATION}
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


def objective_passes(config: ConfigDict, cfg: Blip3oConfig, batch: Batch) -> dict[str, Pass]:
  """What one example goes through in a step, {part: pass}.

  Raises:
    UserError: an objective that has no entry here.
  """
  text = getattr(cfg.backbone, "text", cfg.backbone)
  length = batch["tokens"].shape[1] if "tokens" in batch else 0
  parts: dict[str, Pass] = {}
  if config.objective in ("generation", "decoding") and "pixels" in batch:
    parts["encoder"] = Pass("clip", flops.clip_encoder(cfg.clip), gradient=False)
  if config.objective == "generation":
    prefix = config.objective_args.get("prefix_pass", True)
    parts["backbone, prompt"] = Pass("backbone", flops.text_decoder(text, length), gradient=not prefix)
    parts["backbone, queries"] = Pass("backbone", flops.text_decoder(text, cfg.queries, cached=length))
    parts["DiT"] = Pass("dit", flops.next_dit(cfg.dit, cfg.queries))
  elif config.objective == "decoding":
    side, tokens = cfg.image_size // cfg.vae.downsampling, math.prod(cfg.dit.grid)
    parts["VAE"] = Pass("vae", flops.vae_encode(cfg.vae, cfg.image_size), gradient=False)
    parts["UNet"] = Pass("unet", flops.unet(cfg.unet, side, tokens))
  elif config.objective == "understanding":
    if "patches" in batch:
      parts["vision tower"] = Pass("backbone", flops.qwen_vision(cfg.backbone.vision, batch["patches"].shape[1]))
    parts["backbone"] = Pass("backbone", flops.text_decoder(text, length))
    parts["vocabulary"] = Pass("backbone", flops.text_logits(text, length))
  else:
    raise UserError(
      f"the cost of objective {config.objective!r} is not known to planning; it knows generation, "
      "decoding and understanding"
    )
  return parts


# ---- inference


def _generate(config: ConfigDict, mesh: Mesh) -> list[Program]:
  """A picture from a prompt: features by the DiT, then pixels by the UNet and the VAE, as inference.model draws."""
  cfg = architecture(config)
  sampling = drawing.Sampling(**config.sampling.to_dict())
  model, rows, side = Blip3o(cfg, dtype=jnp.bfloat16), rules.batch_sharding(mesh), math.isqrt(math.prod(cfg.dit.grid))
  b, length = config.batch_size, config.data.get("max_length", 128)
  array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((b, *shape), dtype, sharding=rows)
  keys = jax.ShapeDtypeStruct((b,), jax.random.key(0).dtype, sharding=rows)
  params = abstract_params(cfg, ("backbone", "queries", "dit", "unet", "vae"), jnp.bfloat16, mesh)
  prompt = array(length, dtype=jnp.int32), array(length, dtype=jnp.bool_), array(3, length, dtype=jnp.int32)
  features = array(side**2, cfg.dit.in_channels)
  first, second = (model, params, *prompt, keys), (model, params, features, features, keys)
  text = getattr(cfg.backbone, "text", cfg.backbone)
  # Guidance doubles every step (an interval of it only some; the dearest case is counted).
  dit_calls = sampling.steps * (1 + (sampling.guidance != 1))
  unet_calls = sampling.decoder_steps * (1 + (sampling.decoder_guidance > 1))
  latent = cfg.image_size // cfg.vae.downsampling
  counts = {
    "backbone": flops.text_decoder(text, length) + flops.text_decoder(text, cfg.queries, cached=length),
    "DiT": dit_calls * flops.next_dit(cfg.dit, cfg.queries),
  }
  pixels = {
    "UNet": unet_calls * flops.unet(cfg.unet, latent, side**2),
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
