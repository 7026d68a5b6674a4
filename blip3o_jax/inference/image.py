"""Pictures from prompts: query pass, guided DiT loop, guided UNet loop, VAE. Two compiled programs for each shape.

Random numbers belong to a picture, not to a batch: picture i of a seed draws its noise from its own key, so it is the
same in any batch. Order of the draws as in the release (spec 6.5): DiT noise, DiT noise of the null prompt, latents.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.diffusion.euler_discrete import sample_euler_discrete
from blip3o_jax.diffusion.guidance import null_first
from blip3o_jax.diffusion.solvers import sample_flow
from blip3o_jax.errors import UserError
from blip3o_jax.models.blip3o import Blip3o

DECODER_NULLS = ("generated", "image", "zeros")


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How pictures are drawn; the defaults are the release's (spec 3.3, 6.3, 6.5).

  steps, guidance, shift: of the DiT; shift > 1 takes more steps at high noise (flow_matching.shift_sigma).
  exact_times: give the DiT 1000 sigma itself, not its integer part.
  decoder_steps, decoder_guidance: of the UNet; guidance <= 1 leaves the null condition out.
  decoder_null: what the UNet's null condition is: "generated" (a picture drawn for " "), "image" (the features of an
  all-zero normalised image, as in the release's image mode) or "zeros".
  form, wording: of the prompt (data.templates).
  """

  steps: int = 30
  guidance: float = 3.0
  shift: float = 1.0
  exact_times: bool = False
  decoder_steps: int = 50
  decoder_guidance: float = 3.0
  decoder_null: str = "generated"
  form: str = "inference"
  wording: str = "release"

  def __post_init__(self):
    if self.steps < 1 or self.decoder_steps < 1:
      raise UserError(f"steps are {self.steps} and {self.decoder_steps}; take at least one of each")
    if self.decoder_null not in DECODER_NULLS:
      raise UserError(f"decoder_null {self.decoder_null!r} is unknown; choose one of {', '.join(DECODER_NULLS)}")


def picture_keys(seed: int, pictures: np.ndarray) -> jax.Array:
  """Random keys [B] of picture numbers int [B] of one seed."""
  return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(pictures, jnp.uint32))


def _noise(keys: jax.Array, draw: int, shape: tuple[int, ...]) -> jax.Array:
  """Unit normal float32 [B, *shape]; row b depends on keys[b] alone."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape))(keys)


@functools.partial(jax.jit, static_argnames=("model", "steps", "guidance", "shift", "exact_times", "draw"))
def draw_features(
  model: Blip3o,
  params,
  tokens,
  mask,
  positions,
  keys,
  *,
  steps: int,
  guidance: float,
  shift: float = 1.0,
  exact_times: bool = False,
  draw: int = 0,
) -> jax.Array:
  """Prompts -> CLIP features, float32 [B, N, C], row-major (spec 3.3).

  Args:
    tokens, mask [B, L], positions [B, 3, L]: prompts that end with the image-start token.
    keys: [B], one a picture. draw: 0 for the picture, 1 for the null prompt of the decoder.
    guidance: v = v_null + guidance (v_cond - v_null), null = zeros, first in the batch; at exactly 1 it is left out.
  """
  call = lambda *args, method: model.apply({"params": params}, *args, method=method)
  cfg = model.cfg.dit
  condition = call(tokens, mask, positions, method="query_states")
  noise = _noise(keys, draw, (*cfg.grid, cfg.in_channels))
  if guidance != 1:
    condition = null_first(condition)
  projected = call(condition, method="project_condition")
  velocity = lambda x, t: call(x.astype(model.dtype), t, condition, projected, method="velocity")
  settings = {"steps": steps, "guidance": guidance, "shift": shift, "truncate_times": not exact_times}
  x = sample_flow(velocity, noise, **settings).latents
  return x.reshape(x.shape[0], -1, x.shape[-1])


@functools.partial(jax.jit, static_argnames=("model", "steps", "guidance"))
def draw_pixels(model: Blip3o, params, features, null, keys, *, steps: int, guidance: float) -> jax.Array:
  """CLIP features -> pictures, uint8 [B, H, W, 3] (spec 6.3, 6.4).

  Args:
    features: [B, N, C]; null: [B, N, C], used if guidance > 1; keys: [B].
  """
  if jax.default_backend() == "cpu":  # see nn.linear.Conv: in a rolled loop a product is far faster there
    cfg = model.cfg
    model = model.clone(cfg=dataclasses.replace(cfg, unet=dataclasses.replace(cfg.unet, conv_method="matmul")))
  call = lambda *args, method: model.apply({"params": params}, *args, method=method)
  cfg = model.cfg
  side = cfg.image_size // cfg.vae.downsampling
  context = jnp.concatenate([features, null]) if guidance > 1 else features
  context = context.astype(model.dtype)
  projected = call(context, method="project_context")

  predict = lambda latents, t: call(latents.astype(model.dtype), t, context, projected, method="unet_predict")
  noise = _noise(keys, 2, (side, side, cfg.unet.in_channels))
  sample = sample_euler_discrete(predict, noise, cfg.decoder_process, steps=steps, guidance=guidance)
  images = call(sample.latents / cfg.vae.scaling_factor + cfg.vae.shift, method="vae_decode").astype(jnp.float32)
  return jnp.round(jnp.clip(images / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("model",))
def encode_features(model: Blip3o, params, pixels) -> jax.Array:
  """uint8 [B, S, S, 3] at the CLIP encoder's size -> pooled features float32 [B, N, C]."""
  return model.apply({"params": params}, pixels, method="clip_features").astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("model",))
def null_image_features(model: Blip3o, params) -> jax.Array:
  """Pooled features of an all-zero normalised image, float32 [1, N, C] (spec 6.5)."""
  return model.apply({"params": params}, method="null_clip_features").astype(jnp.float32)
