"""The image autoencoder with a KL-regularised latent (diffusers' AutoencoderKL; spec part 6.1: the VAE of SDXL)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.errors import require_plain
from blip3o_jax.nn.attention import attention
from blip3o_jax.nn.linear import Conv, Dense
from blip3o_jax.nn.norms import GroupNorm
from blip3o_jax.nn.resnet import Downsample, ResnetBlock, Upsample

IMAGE = ("batch", None, None, "act_embed")


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
  """Sizes of the autoencoder; the defaults are SDXL's (83,653,863 parameters).

  `scaling_factor` and `shift` belong to the user of the latents: z = (latent - shift) * scaling_factor is what a
  diffusion model sees; `encode` and `decode` do not apply them. `patch_size` p folds p x p pixels into channels before
  the first convolution and unfolds them after the last (1 in every published checkpoint).
  """

  in_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_groups: int = 32
  norm_eps: float = 1e-6
  scaling_factor: float = 0.13025
  shift: float = 0.0
  mid_attention: bool = True
  quant_conv: bool = True
  post_quant_conv: bool = True
  patch_size: int = 1

  @property
  def downsampling(self) -> int:
    """Pixels per latent along one side."""
    return self.patch_size * 2 ** (len(self.block_out_channels) - 1)

  @classmethod
  def from_reference(cls, config: dict) -> "AutoencoderKLConfig":
    """From the reference's config.json.

    Raises:
      UserError: another activation, or latents that are normalised channel by channel.
    """
    # diffusers' defaults where a file is silent
    config = {"in_channels": 3, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 32} | config
    require_plain("VAE config.json", config, {"act_fn": "silu", "latents_mean": None, "latents_std": None})
    return cls(
      in_channels=config["in_channels"],
      latent_channels=config["latent_channels"],
      block_out_channels=tuple(config["block_out_channels"]),
      layers_per_block=config["layers_per_block"],
      norm_groups=config["norm_num_groups"],
      scaling_factor=config.get("scaling_factor", 0.18215),
      shift=config.get("shift_factor") or 0.0,
      mid_attention=config.get("mid_block_add_attention", True),
      quant_conv=config.get("use_quant_conv", True),
      post_quant_conv=config.get("use_post_quant_conv", True),
      patch_size=config.get("patch_size", 1),  # our own word, see to_reference
    )

  def to_reference(self) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKL, which warns of `patch_size` where it is not 1: it has no such thing."""
    levels = len(self.block_out_channels)
    content = {
      "in_channels": self.in_channels,
      "out_channels": self.in_channels,
      "down_block_types": ["DownEncoderBlock2D"] * levels,
      "up_block_types": ["UpDecoderBlock2D"] * levels,
      "latent_channels": self.latent_channels,
      "block_out_channels": list(self.block_out_channels),
      "layers_per_block": self.layers_per_block,
      "norm_num_groups": self.norm_groups,
      "act_fn": "silu",
      "scaling_factor": self.scaling_factor,
      "shift_factor": self.shift or None,
      "mid_block_add_attention": self.mid_attention,
      "use_quant_conv": self.quant_conv,
      "use_post_quant_conv": self.post_quant_conv,
    }
    return content | ({"patch_size": self.patch_size} if self.patch_size > 1 else {})


class _Part(nn.Module):
  """What encoder and decoder share: the factories of their layers and the middle block."""

  cfg: AutoencoderKLConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @property
  def types(self) -> dict:
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}

  def conv(self, features: int, name: str, **kwargs) -> Conv:
    return Conv(features, **self.types, name=name, **kwargs)

  def norm(self, name: str) -> GroupNorm:
    return GroupNorm(self.cfg.norm_groups, self.cfg.norm_eps, **self.types, name=name)

  def resnet(self, features: int, name: str) -> ResnetBlock:
    cfg = self.cfg
    return ResnetBlock(features, cfg.norm_groups, cfg.norm_eps, **self.types, name=name)

  def middle(self, x: jax.Array) -> jax.Array:
    """resnet, one-head self-attention over all places, resnet: [B, h, w, C] -> [B, h, w, C]."""
    b, h, w, c = x.shape
    x = self.resnet(c, "mid_resnet_0")(x)
    if self.cfg.mid_attention:
      tokens = self.norm("mid_norm")(x).reshape(b, h * w, c)
      dense = lambda name: Dense(c, ("embed", "heads"), **self.types, name=f"mid_{name}")
      q, k, v = (dense(name)(tokens)[:, :, None] for name in "qkv")
      out = Dense(c, ("heads", "embed"), **self.types, name="mid_out")
      x = x + out(attention(q, k, v)[:, :, 0]).reshape(x.shape)
    return self.resnet(c, "mid_resnet_1")(x)


class Encoder(_Part):
  """[B, H, W, 3] -> mean and log variance, concatenated: [B, h, w, 2c]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.cfg
    x = self.conv(cfg.block_out_channels[0], "conv_in")(space_to_depth(x, cfg.patch_size))
    for i, features in enumerate(cfg.block_out_channels):
      for j in range(cfg.layers_per_block):
        x = self.resnet(features, f"down_{i}_resnet_{j}")(x)
      if i < len(cfg.block_out_channels) - 1:
        x = Downsample(((0, 1), (0, 1)), **self.types, name=f"down_{i}_downsample")(x)
      x = nn.with_logical_constraint(x, IMAGE)
    x = self.middle(x)
    return self.conv(2 * cfg.latent_channels, "conv_out")(nn.silu(self.norm("norm_out")(x)))


class Decoder(_Part):
  """Latents [B, h, w, c] -> [B, H, W, 3]."""

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    cfg = self.cfg
    widths = cfg.block_out_channels[::-1]
    x = self.middle(self.conv(widths[0], "conv_in")(z))
    for i, features in enumerate(widths):
      for j in range(cfg.layers_per_block + 1):
        x = self.resnet(features, f"up_{i}_resnet_{j}")(x)
      if i < len(widths) - 1:
        x = Upsample(**self.types, name=f"up_{i}_upsample")(x)
      x = nn.with_logical_constraint(x, IMAGE)
    x = self.conv(cfg.in_channels * cfg.patch_size**2, "conv_out")(nn.silu(self.norm("norm_out")(x)))
    return depth_to_space(x, cfg.patch_size)


class AutoencoderKL(nn.Module):
  """Images to latents and back. H and W are multiples of `cfg.downsampling`; h = H / cfg.downsampling."""

  cfg: AutoencoderKLConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    cfg, types = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.encoder = Encoder(cfg, **types)
    self.decoder = Decoder(cfg, **types)
    if cfg.quant_conv:
      self.quant_conv = Conv(2 * cfg.latent_channels, 1, padding=0, **types)
    if cfg.post_quant_conv:
      self.post_quant_conv = Conv(cfg.latent_channels, 1, padding=0, **types)

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """images [B, H, W, 3] in -1..1 -> (mean, logvar), each [B, h, w, c] float32; logvar is clipped to -30..20."""
    x = self.encoder(images)
    if self.cfg.quant_conv:
      x = self.quant_conv(x)
    mean, logvar = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, latents: jax.Array) -> jax.Array:
    """latents [B, h, w, c], before any scaling factor -> images [B, H, W, 3], about -1..1, not clipped."""
    if self.cfg.post_quant_conv:
      latents = self.post_quant_conv(latents)
    return self.decoder(latents)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Reconstruction through the posterior mean: [B, H, W, 3] -> [B, H, W, 3]."""
    return self.decode(self.encode(images)[0])


def space_to_depth(x: jax.Array, p: int) -> jax.Array:
  """[B, H, W, C] -> [B, H / p, W / p, p * p * C], channels ordered (row, column, C)."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h // p, w // p, p * p * c)


def depth_to_space(x: jax.Array, p: int) -> jax.Array:
  """The inverse of `space_to_depth`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, p, p, c // (p * p)).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * p, w * p, c // (p * p))
