"""The unified model: backbone + learnable queries + DiT, the CLIP encoder that makes its targets, and the decoder.

`DESIGNS` are the three that the paper compares (section 3.3). What draws and what it draws are of several kinds each:
see `MODULES`.

One linen module whose parameter tree is {component: tree}. Every stage and every command touches only some components;
the others may be missing from the tree. Call it as

  model.apply({"params": params}, ..., method="query_states")
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.diffusion.dpm_solver import DPMSolverConfig
from blip3o_jax.diffusion.euler_discrete import EulerDiscreteConfig
from blip3o_jax.errors import UserError
from blip3o_jax.models.autoencoder_dc import AutoencoderDC, AutoencoderDCConfig
from blip3o_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from blip3o_jax.models.eva_clip import EvaClip, EvaClipConfig, pool
from blip3o_jax.models.next_dit import NextDiT, NextDiTConfig
from blip3o_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig
from blip3o_jax.models.qwen3_siglip import Qwen3Siglip, Qwen3SiglipConfig
from blip3o_jax.models.sana import Sana, SanaConfig
from blip3o_jax.models.siglip import Siglip, SiglipConfig
from blip3o_jax.models.siglip import normalize as siglip_normalize
from blip3o_jax.models.text_decoder import TextDecoder, TextDecoderConfig
from blip3o_jax.models.text_tower import TextTower, TextTowerConfig
from blip3o_jax.models.unet import UNet, UNetConfig
from blip3o_jax.nn.linear import Dense

# Mean and standard deviation of OpenAI CLIP, which EVA-CLIP and Qwen2.5-VL use too (spec 5.4).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The language models that may read the prompt. All have embed, decode, logits, empty_cache, touch and `image_keys`, and
# their configs have `dim`. Llama 3 is a plain TextDecoder: it reads no pictures.
BACKBONES = {Qwen25VLConfig: Qwen25VL, Qwen3SiglipConfig: Qwen3Siglip, TextDecoderConfig: TextDecoder}
BackboneConfig = Qwen25VLConfig | Qwen3SiglipConfig | TextDecoderConfig

# The other parts that are of one kind or another; SigLIP2, Sana and the DC-AE belong together (spec part 7).
MODULES = BACKBONES | {
  EvaClipConfig: EvaClip,
  SiglipConfig: Siglip,
  UNetConfig: UNet,
  SanaConfig: Sana,
  AutoencoderKLConfig: AutoencoderKL,
  AutoencoderDCConfig: AutoencoderDC,
}

COMPONENTS = ("backbone", "queries", "dit", "clip", "text_tower", "unet", "vae", "projection")

# What the query states become, and the components that draw a picture then:
#   clip_flow  CLIP features by flow matching, then pixels by the decoder (BLIP3-o itself)
#   clip_mse   CLIP features by a linear projection, then pixels by the decoder
#   vae_flow   latents of the VAE by flow matching, then pixels by the VAE alone
DESIGNS = {
  "clip_flow": ("backbone", "queries", "dit", "unet", "vae"),
  "clip_mse": ("backbone", "queries", "projection", "unet", "vae"),
  "vae_flow": ("backbone", "queries", "dit", "vae"),
}


@dataclasses.dataclass(frozen=True)
class Blip3oConfig:
  """Every part of one model; one that is never called may be None (`text_tower`: the CLIP encoder is ready-made).

  Raises:
    UserError: an unknown design.
  """

  backbone: BackboneConfig
  dit: NextDiTConfig
  clip: EvaClipConfig | SiglipConfig
  unet: UNetConfig | SanaConfig
  vae: AutoencoderKLConfig | AutoencoderDCConfig
  decoder_process: EulerDiscreteConfig | DPMSolverConfig = EulerDiscreteConfig()
  text_tower: TextTowerConfig | None = None
  queries: int = 64
  image_size: int = 1024  # side of a drawn picture, pixels
  design: str = "clip_flow"  # of DESIGNS

  def __post_init__(self):
    if self.design not in DESIGNS:
      raise UserError(f"model.design {self.design!r} is unknown; choose one of {', '.join(DESIGNS)}")


def to_uint8(images: jax.Array) -> jax.Array:
  """Images in -1..1 -> uint8, clamped."""
  return jnp.round(jnp.clip(images / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


class LatentQueries(nn.Module):
  """The learnable queries [Q, D], N(0, 1) at first (spec 2.7)."""

  count: int
  dim: int
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, batch: int) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("queries", "embed"))
    queries = self.param("latent_queries", init, (self.count, self.dim), self.param_dtype)
    return jnp.broadcast_to(queries.astype(self.dtype), (batch, self.count, self.dim))


class Blip3o(nn.Module):
  """See the module docstring. `dtype` is the compute dtype of every part."""

  cfg: Blip3oConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    made = lambda cfg: None if cfg is None else MODULES[type(cfg)](cfg, **kinds)
    self.backbone = made(self.cfg.backbone)
    self.latents = LatentQueries(self.cfg.queries, self.cfg.backbone.dim, name="queries", **kinds)
    self.dit = NextDiT(self.cfg.dit, **kinds)
    self.clip, self.unet, self.vae = made(self.cfg.clip), made(self.cfg.unet), made(self.cfg.vae)
    if self.cfg.clip is not None:
      self.projection = Dense(self.cfg.clip.width, ("embed", None), use_bias=False, **kinds)
    if self.cfg.text_tower is not None:
      self.text_tower = TextTower(self.cfg.text_tower, **kinds)

  # ---- the CLIP encoder: pixels -> what the DiT learns to draw

  def clip_features(self, pixels: jax.Array) -> jax.Array:
    """uint8 [B, S, S, 3] -> pooled features [B, N, C], row-major (spec 5.2, 5.3; SigLIP2: 7.1).

    Pictures of another size than the encoder's are resized on the way (bicubic, antialiased).
    """
    size = self.cfg.clip.image_size
    x = pixels.astype(jnp.float32)
    if pixels.shape[1:3] != (size, size):
      x = jnp.clip(jnp.round(jax.image.resize(x, (len(x), size, size, 3), "cubic")), 0, 255)
    if isinstance(self.cfg.clip, SiglipConfig):
      return self._pooled(siglip_normalize(x))
    return self._pooled((x / 255.0 - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD))

  def null_clip_features(self) -> jax.Array:
    """Pooled features [1, N, C] of no picture, the decoder's null: of an all-zero normalised image (spec 6.5), for
    SigLIP2 of a black one (spec 7.1)."""
    black = isinstance(self.cfg.clip, SiglipConfig)
    return self._pooled(jnp.full((1, self.cfg.clip.image_size, self.cfg.clip.image_size, 3), -1.0 if black else 0.0))

  def _pooled(self, x: jax.Array) -> jax.Array:
    x = self.clip(x.astype(self.dtype))
    return pool(x.penultimate if isinstance(self.cfg.clip, SiglipConfig) else x, self.cfg.clip.pool_stride)

  def contrastive_embeddings(self, features, tokens, mask):
    """See TextTower: features [B, N, C], tokens [B, L], mask [B, L]."""
    return self.text_tower(features, tokens, mask)

  def read_features(self, features, tokens, mask):
    """What features tell: (logits of the caption [B, L, V], pixels behind each token [B, N, P]). See TextTower."""
    return self.text_tower.caption_logits(features, tokens, mask), self.text_tower.pixels(features)

  def image_target(self, pixels: jax.Array) -> jax.Array:
    """uint8 [B, S, S, 3] -> what the design learns to draw, [B, N, C], row-major: CLIP features or VAE latents."""
    if self.cfg.design != "vae_flow":
      return self.clip_features(pixels)
    latents = self.picture_latents(pixels)
    return latents.reshape(latents.shape[0], -1, latents.shape[-1])

  # ---- the backbone

  def understand(self, batch) -> jax.Array:
    """Logits [B, L, V] of a conversation about pictures.

    `batch` has the keys of DESIGN part 3, and the backbone's own `image_keys`.
    """
    images = {key: batch[key] for key in self.backbone.image_keys}
    embeddings = self.backbone.embed(batch["tokens"], **images)
    output = self.backbone.decode(embeddings, batch["positions"], batch["token_mask"])
    return self.backbone.logits(output.hidden)

  def query_states(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    images: Mapping[str, jax.Array] | None = None,
    *,
    prefix_pass: bool = True,
  ) -> jax.Array:
    """Hidden states of the learnable queries after a prompt: the condition of the DiT.

    Prefix pass: the backbone is causal and frozen, so the prompt runs once without gradients and the queries run on its
    keys and values. Same numbers, and same gradients of queries and DiT, as one pass over [prompt; queries], which
    `prefix_pass=False` does: the only right choice when a parameter of the backbone trains.

    Args:
      tokens: [B, L] int32 ending with the image-start token, padded on either side.
      mask: [B, L] bool, True on real tokens.
      positions: [B, 3, L] int32; each row counts its own tokens (spec 4.2: plain one-dimensional positions).
      images: pictures of the prompts under the backbone's `image_keys` (reconstruction, editing; spec 4.4).

    Returns:
      [B, Q, D] after the final norm.
    """
    b, length = tokens.shape
    q = self.cfg.queries
    start = jnp.max(jnp.where(mask[:, None], positions, -1), axis=-1, keepdims=True) + 1  # [B, 3, 1]
    query_positions, query_mask = start + jnp.arange(q), jnp.ones((b, q), bool)
    prompt, queries = self.backbone.embed(tokens, **(images or {})), self.latents(b)
    if prefix_pass:
      cache = self.backbone.empty_cache(b, length + q)
      cache = jax.lax.stop_gradient(self.backbone.decode(prompt, positions, mask, cache).cache)
      return self.backbone.decode(queries, query_positions, query_mask, cache).hidden
    output = self.backbone.decode(
      jnp.concatenate([prompt, queries], axis=1),
      jnp.concatenate([positions, query_positions], axis=-1),
      jnp.concatenate([mask, query_mask], axis=-1),
    )
    return output.hidden[:, length:]

  def regress(self, states: jax.Array) -> jax.Array:
    """Query states [B, Q, D] -> CLIP features [B, Q, C], linear: the design without a DiT (paper, 3.2)."""
    return self.projection(states)

  # ---- the diffusion transformer

  def velocity(self, x: jax.Array, t: jax.Array, condition: jax.Array, projected=None) -> jax.Array:
    """Predicted noise - data: x [B, h, w, C], t [B] in 0..1000, condition [B, Q, D] -> [B, h, w, C]."""
    return self.dit(x, t, condition, projected)

  def project_condition(self, condition: jax.Array):
    """What the DiT makes of the condition [B, Q, D] alone, once for all steps: pass it as `projected`."""
    return self.dit.project(condition)

  # ---- the decoder

  def unet_predict(self, latents: jax.Array, t: jax.Array, context: jax.Array, projected=None) -> jax.Array:
    """UNet output for latents [B, h, w, 4], t [B] and CLIP tokens [B, N, C] (spec 6.2: mean token, fixed time ids).

    Sana's for its own latents: the velocity.
    """
    if isinstance(self.cfg.unet, SanaConfig):
      return self.unet(latents, t, context, projected)
    size = float(self.cfg.image_size)
    time_ids = jnp.broadcast_to(jnp.asarray([size, size, 0.0, 0.0, size, size]), (latents.shape[0], 6))
    return self.unet(latents, t, context, jnp.mean(context, axis=1), time_ids, projected=projected)

  def project_context(self, context: jax.Array):
    """What the UNet makes of the context [B, N, C] alone, once for all steps: pass it as `projected`."""
    return self.unet.project(context)

  def vae_encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images [B, H, W, 3] in -1..1 -> mean and log variance [B, h, w, 4] (not scaled)."""
    return self.vae.encode(images)

  def vae_decode(self, latents: jax.Array) -> jax.Array:
    """Latents [B, h, w, 4] (not scaled) -> images [B, H, W, 3], about -1..1."""
    return self.vae.decode(latents)

  def picture_latents(self, pixels: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] -> the latents that a diffusion model sees, float32 [B, h, w, c]: means, shifted, scaled."""
    encoded = self.vae.encode(pixels.astype(jnp.float32) / 127.5 - 1.0)
    mean = encoded[0] if isinstance(self.cfg.vae, AutoencoderKLConfig) else encoded
    return (mean.astype(jnp.float32) - self.cfg.vae.shift) * self.cfg.vae.scaling_factor

  def latent_pictures(self, latents: jax.Array) -> jax.Array:
    """The inverse: [B, h, w, c] as a diffusion model draws them -> uint8 [B, H, W, 3] (spec 6.4)."""
    return to_uint8(self.latent_images(latents))

  def latent_images(self, latents: jax.Array) -> jax.Array:
    """The same, not yet rounded: float32 [B, H, W, 3], about -1..1."""
    return self.vae.decode(latents / self.cfg.vae.scaling_factor + self.cfg.vae.shift).astype(jnp.float32)

  # ---- parameters

  def touch(self, components: Sequence[str]) -> None:
    """Run every named component once on the smallest input, so that `init` makes exactly their parameters."""
    cfg = self.cfg
    tokens, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    side = cfg.clip.image_size // cfg.clip.patch_size // cfg.clip.pool_stride
    features = jnp.zeros((1, side**2, cfg.clip.width))
    side = cfg.image_size // cfg.vae.downsampling
    latents = jnp.zeros((1, side, side, cfg.unet.in_channels))
    condition = jnp.zeros((1, cfg.queries, cfg.backbone.dim))
    grid = jnp.zeros((1, *cfg.dit.grid, cfg.dit.in_channels))
    t = jnp.zeros((1,))
    runs = {
      "backbone": lambda: self.backbone.touch(),
      "queries": lambda: self.latents(1),
      "dit": lambda: self.velocity(grid, t, condition),
      "clip": lambda: self.null_clip_features(),
      "text_tower": lambda: self.text_tower.touch(features, tokens, mask),
      "unet": lambda: self.unet_predict(latents, t, jnp.zeros((1, 1, cfg.unet.context_dim))),
      "vae": lambda: self.latent_pictures(self.picture_latents(jnp.zeros((1, cfg.image_size, cfg.image_size, 3)))),
      "projection": lambda: self.regress(condition),
    }
    for name in components:
      runs[name]()

  def init_components(self, rng: jax.Array, components: Sequence[str]) -> dict[str, Any]:
    """Fresh parameters {component: tree}, leaves boxed with their logical axis names (`nn.unbox` removes them).

    Each component draws from its own stream, so that it does not depend on which others are asked for.
    """
    params = {}
    for name in components:
      stream = jax.random.fold_in(rng, COMPONENTS.index(name))
      params |= self.init(stream, (name,), method="touch")["params"]
    return params
