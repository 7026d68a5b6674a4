"""Pictures from prompts: query pass, guided DiT loop, guided decoder loop, VAE. Two compiled programs for each shape.

Random numbers belong to a picture, not to a batch: picture i of a seed draws its noise from its own key, so it is the
same in any batch. Draws are numbered in the release's order (spec 6.5): DiT noise, DiT noise of the null prompt (of a
key of its own, as all pictures share that), latents.
"""

import dataclasses
import functools
import numbers
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.data import templates
from blip3o_jax.diffusion.dpm_solver import DPMSolverConfig, sample_dpm_solver
from blip3o_jax.diffusion.euler_discrete import sample_euler_discrete
from blip3o_jax.diffusion.guidance import null_first
from blip3o_jax.diffusion.solvers import SOLVERS, sample_flow
from blip3o_jax.errors import UserError
from blip3o_jax.inference.tiling import decode_tiled
from blip3o_jax.models.blip3o import Blip3o, to_uint8

DECODER_NULLS = ("generated", "image", "zeros")
DECODER_SOLVERS = (*SOLVERS, "dpm++")
PIXEL_SETTINGS = ("decoder_steps", "decoder_guidance", "decoder_solver", "decoder_interval", "decoder_tile")
_MOST_STEPS, _MOST_GUIDANCE = 1000, 100.0
_KINDS = {  # of settings: what is taken for one, and its name
  int: (numbers.Integral, "a whole number"),
  float: (numbers.Real, "a number"),
  bool: (bool, "true or false"),
  str: (str, "a word"),
  tuple: ((list, tuple), "two noise levels, [low, high]"),
}
_WORDS = {  # that a setting may be
  "solver": SOLVERS,
  "decoder_solver": DECODER_SOLVERS,
  "decoder_null": DECODER_NULLS,
  "form": templates.FORMS,
  "wording": tuple(templates.WORDINGS),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How pictures are drawn; the defaults are the release's (spec 3.3, 6.3, 6.5).

  steps, guidance, shift: of the DiT; shift > 1 takes more steps at high noise (flow_matching.shift_sigma).
  exact_times: give the DiT 1000 sigma itself, not its integer part.
  solver: of the DiT: "euler", or "adams_bashforth" of second order, as many evaluations; goes well with exact_times.
  guidance_interval: noise levels, 1 the purest, at which the DiT is guided; elsewhere the null is left out, which saves
  its half of the work.
  decoder_steps, decoder_guidance, decoder_solver, decoder_interval: the same of the decoder; guidance <= 1 leaves the
  null condition out. Sana's "dpm++" is the solver of its release.
  decoder_null: what the decoder's null condition is: "generated" (a picture drawn for " "), "image" (the features of an
  all-zero normalised image, for SigLIP2 of a black one, as in the release's image mode) or "zeros".
  decoder_tile: side, in latents, of the tiles that the VAE decodes one after another to save memory; 0: all at once.
  form, wording: of the prompt (data.templates).
  """

  steps: int = 30
  guidance: float = 3.0
  shift: float = 1.0
  exact_times: bool = False
  solver: str = "euler"
  guidance_interval: tuple[float, float] = (0.0, 1.0)
  decoder_steps: int = 50
  decoder_guidance: float = 3.0
  decoder_solver: str = "euler"
  decoder_interval: tuple[float, float] = (0.0, 1.0)
  decoder_null: str = "generated"
  decoder_tile: int = 0
  form: str = "inference"
  wording: str = "release"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, kind = getattr(self, field.name), type(field.default)
      takes, words = _KINDS[kind]
      if not isinstance(value, takes) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{field.name} is {value!r}; give {words}")
      object.__setattr__(self, field.name, kind(value))  # 3 and 3.0 would be two programs, and JSON has lists
    if not (1 <= self.steps <= _MOST_STEPS and 1 <= self.decoder_steps <= _MOST_STEPS):
      raise UserError(f"steps are {self.steps} and {self.decoder_steps}; take 1 to {_MOST_STEPS} of each")
    for name in ("guidance", "decoder_guidance"):
      if not 0 <= getattr(self, name) <= _MOST_GUIDANCE:  # not a number is not in there either
        raise UserError(f"{name} is {getattr(self, name)}; take 0 to {_MOST_GUIDANCE:.0f}, 3 is usual")
    if not 0 < self.shift <= _MOST_GUIDANCE:
      raise UserError(f"shift is {self.shift}; take more than 0 and up to {_MOST_GUIDANCE:.0f}")
    for name in ("guidance_interval", "decoder_interval"):
      ends = getattr(self, name)
      if len(ends) != 2 or any(isinstance(end, str) for end in ends) or not 0 <= ends[0] <= ends[1] <= 1:
        raise UserError(f"{name} is {list(ends)}; give two noise levels, 0 <= low <= high <= 1")
    for name, known in _WORDS.items():
      if getattr(self, name) not in known:
        raise UserError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")

  def changed(self, **changes) -> "Sampling":
    """The same with some fields changed. Raises UserError for an unknown one, or a value that cannot be."""
    fields = [field.name for field in dataclasses.fields(self)]
    if unknown := sorted(set(changes) - set(fields)):
      raise UserError(f"sampling setting {unknown[0]!r} is unknown; there are {', '.join(fields)}")
    return dataclasses.replace(self, **changes)

  def of_features(self) -> dict[str, Any]:
    """The settings of `draw_features`."""
    return {
      "steps": self.steps,
      "guidance": self.guidance,
      "shift": self.shift,
      "exact_times": self.exact_times,
      "solver": self.solver,
      "interval": self.guidance_interval,
    }

  def of_pixels(self) -> dict[str, Any]:
    """The settings of `draw_pixels`."""
    return {name.removeprefix("decoder_"): getattr(self, name) for name in PIXEL_SETTINGS}


def picture_keys(seed: int | Sequence[int], pictures: Sequence[int]) -> jax.Array:
  """Random keys [B] of picture numbers int [B] of one seed, or of one seed each.

  Raises:
    UserError: a seed that is no whole number of 32 bits.
  """
  seeds, pictures = np.broadcast_arrays(np.asarray(seed), np.asarray(pictures))
  if wrong := [s for s in seeds.ravel().tolist() if type(s) is not int or not 0 <= s < 2**32]:
    raise UserError(f"seed {wrong[0]} is no whole number from 0 to 2^32 - 1")
  fold = lambda s, picture: jax.random.fold_in(jax.random.key(s), picture)
  return jax.vmap(fold)(jnp.asarray(seeds, jnp.uint32), jnp.asarray(pictures, jnp.uint32))


def picture_noise(keys: jax.Array, draw: int, shape: tuple[int, ...]) -> jax.Array:
  """Unit normal float32 [B, *shape]; row b depends on keys[b] alone."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape))(keys)


@functools.partial(
  jax.jit, static_argnames=("model", "steps", "guidance", "shift", "exact_times", "solver", "interval")
)
def draw_features(
  model: Blip3o,
  params,
  tokens,
  mask,
  positions,
  keys,
  draw=0,
  *,
  vision=None,
  steps: int,
  guidance: float,
  shift: float = 1.0,
  exact_times: bool = False,
  solver: str = "euler",
  interval: tuple[float, float] = (0.0, 1.0),
) -> jax.Array:
  """Prompts -> CLIP features, or for the design "vae_flow" latents, float32 [B, N, C], row-major (spec 3.3).

  Args:
    tokens, mask [B, L], positions [B, 3, L]: prompts that end with the image-start token.
    keys: [B], one a picture. draw: 0 for the picture, 1 for the null prompt of the decoder.
    vision: the prompts' pictures under the backbone's `image_keys`; nothing: text alone.
    guidance: v = v_null + guidance (v_cond - v_null), null = zeros, first in the batch; at exactly 1 it is left out.
    solver, interval: see solvers.sample_flow.

  The design "clip_mse" has one answer to a prompt: nothing after `vision` bears on it.
  """
  call = lambda *args, method: model.apply({"params": params}, *args, method=method)
  cfg = model.cfg.dit
  condition = call(tokens, mask, positions, vision, method="query_states")
  if model.cfg.design == "clip_mse":
    return call(condition, method="regress").astype(jnp.float32)
  noise = picture_noise(keys, draw, (*cfg.grid, cfg.in_channels))
  # By size of the batch: one branch, or both. What is not used is not computed.
  conditions = {len(c): c for c in (condition, null_first(condition))}
  projected = {size: call(c, method="project_condition") for size, c in conditions.items()}
  velocity = lambda x, t: call(x.astype(model.dtype), t, conditions[len(x)], projected[len(x)], method="velocity")
  settings = {"steps": steps, "guidance": guidance, "shift": shift, "truncate_times": not exact_times}
  x = sample_flow(velocity, noise, **settings, solver=solver, interval=interval).latents
  return x.reshape(x.shape[0], -1, x.shape[-1])


@functools.partial(jax.jit, static_argnames=("model", "steps", "guidance", "solver", "interval", "tile"))
def draw_pixels(
  model: Blip3o,
  params,
  features,
  null,
  keys,
  *,
  steps: int,
  guidance: float,
  solver: str = "euler",
  interval: tuple[float, float] = (0.0, 1.0),
  tile: int = 0,
) -> jax.Array:
  """CLIP features -> pictures, uint8 [B, H, W, 3] (spec 6.3, 6.4; Sana: 7.3).

  Args:
    features: [B, N, C]; null: [B, N, C], used if guidance > 1; keys: [B].
    solver, interval: see euler_discrete.sample_euler_discrete; Sana: solvers.sample_flow. tile: see decode_tiled;
      0: none.

  Raises:
    UserError: an interval for Sana's own solver, which guides everywhere.
  """
  cfg = model.cfg
  flow = isinstance(cfg.decoder_process, DPMSolverConfig)
  call = lambda *args, method: model.apply({"params": params}, *args, method=method)
  both = jnp.concatenate([null, features] if flow else [features, null])  # each sampler has its own order
  contexts = {len(c): c.astype(model.dtype) for c in (features, both)}
  projected = {size: call(c, method="project_context") for size, c in contexts.items()}

  def predict(latents, t):
    size = len(latents)
    return call(latents.astype(model.dtype), t, contexts[size], projected[size], method="unet_predict")

  side = cfg.image_size // cfg.vae.downsampling
  noise = picture_noise(keys, 2, (side, side, cfg.unet.in_channels))
  settings = {"steps": steps, "guidance": max(guidance, 1.0) if flow else guidance}
  if flow and solver == "dpm++":
    if interval != (0.0, 1.0):
      raise UserError('decoder_interval does not go with "dpm++" of Sana; take decoder_solver "euler"')
    sample = sample_dpm_solver(predict, noise, cfg.decoder_process, **settings)
  elif flow:
    sample = sample_flow(predict, noise, **settings, truncate_times=False, solver=solver, interval=interval)
  else:
    sample = sample_euler_discrete(predict, noise, cfg.decoder_process, **settings, solver=solver, interval=interval)
  decode = lambda latents: call(latents, method="latent_images")
  # Said once more: the loop's results are cut as the partitioner likes, and then every chip decodes those of all.
  latents = nn.with_logical_constraint(sample.latents, ("batch", None, None, None))
  return to_uint8(decode_tiled(decode, latents, tile) if tile else decode(latents))


@functools.partial(jax.jit, static_argnames=("model",))
def draw_latents(model: Blip3o, params, latents) -> jax.Array:
  """Latents [B, N, C] of the design "vae_flow", row-major -> pictures, uint8 [B, H, W, 3]."""
  grid = latents.reshape(latents.shape[0], *model.cfg.dit.grid, -1)
  return model.apply({"params": params}, grid, method="latent_pictures")


@functools.partial(jax.jit, static_argnames=("model",))
def encode_features(model: Blip3o, params, pixels) -> jax.Array:
  """uint8 [B, S, S, 3] at the CLIP encoder's size -> pooled features float32 [B, N, C]."""
  return model.apply({"params": params}, pixels, method="clip_features").astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("model",))
def null_image_features(model: Blip3o, params) -> jax.Array:
  """Pooled features of an all-zero normalised image, float32 [1, N, C] (spec 6.5)."""
  return model.apply({"params": params}, method="null_clip_features").astype(jnp.float32)
