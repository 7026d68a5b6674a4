"""The deep compression autoencoder, Sana's: 32 pixels a latent along each side and no sampling in between (diffusers'
AutoencoderDC; spec part 7.1; Chen et al. 2024, arXiv 2410.10733)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.errors import UserError
from blip3o_jax.nn.attention import linear_attention
from blip3o_jax.nn.linear import Conv, Dense, DepthwiseConv, default_init
from blip3o_jax.nn.mlp import GLUMBConv
from blip3o_jax.nn.norms import RMSNorm

IMAGE = ("batch", None, None, "act_embed")
_ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "relu": nn.relu}
_EPS = 1e-5  # of every norm


class DCLevel(NamedTuple):
  """One resolution: `blocks` blocks of `width` channels. `scales`: sizes of the depthwise kernels beside the plain
  queries, keys and values, for "EfficientViTBlock" alone; `activation` is that of "ResBlock"."""

  width: int
  blocks: int
  block: str = "ResBlock"  # | "EfficientViTBlock"
  scales: tuple[int, ...] = ()
  activation: str = "silu"


@dataclasses.dataclass(frozen=True)
class AutoencoderDCConfig:
  """Levels of encoder and decoder, finest first (a first level of no blocks is folded into the second).

  `unshuffle` halves by folding pixels into channels, else by a stride of 2; `shuffle` doubles by the inverse, else by
  repeating pixels. `scaling_factor` belongs to the user of the latents: z = latent * scaling_factor is what a
  diffusion model sees; `encode` and `decode` do not apply it.
  """

  encoder: tuple[DCLevel, ...]
  decoder: tuple[DCLevel, ...]
  in_channels: int = 3
  latent_channels: int = 32
  head_size: int = 32
  unshuffle: bool = False
  shuffle: bool = False
  encoder_out_shortcut: bool = True
  decoder_in_shortcut: bool = True
  out_activation: str = "relu"
  scaling_factor: float = 0.41407

  def __post_init__(self):
    for side in ("encoder", "decoder"):  # a file holds a level as a list
      levels = (DCLevel(*(tuple(v) if isinstance(v, list) else v for v in level)) for level in getattr(self, side))
      object.__setattr__(self, side, tuple(levels))

  @property
  def shift(self) -> float:
    """Of the latents; only AutoencoderKL has one."""
    return 0.0

  @property
  def downsampling(self) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(self.encoder) - 1)

  @classmethod
  def from_reference(cls, config: Mapping[str, Any]) -> "AutoencoderDCConfig":
    """From the reference's config.json.

    Raises:
      UserError: an activation, norm or block that Sana's autoencoder does not have (batch norm is the ImageNet
        variants'), or lists of different lengths.
    """

    def levels(side: str, norms: str | Sequence[str], activations: str | Sequence[str]) -> tuple[DCLevel, ...]:
      widths = config[f"{side}_block_out_channels"]
      each = lambda v: (v,) * len(widths) if isinstance(v, str) else tuple(v)
      columns = {
        "blocks": tuple(config[f"{side}_layers_per_block"]),
        "block": each(config.get(f"{side}_block_types", "ResBlock")),
        "scales": tuple(map(tuple, config[f"{side}_qkv_multiscales"])),
        "activation": each(activations),
        "norm": each(norms),
      }
      known = {"block": {"ResBlock", "EfficientViTBlock"}, "activation": set(_ACTIVATIONS), "norm": {"rms_norm"}}
      for name, column in columns.items():
        if len(column) != len(widths):
          raise UserError(f"DC-AE config.json: {side} {name} has {len(column)} entries for {len(widths)} levels")
        if unknown := set(column) - known.get(name, set(column)):
          raise UserError(f"DC-AE config.json: {side} {name} {', '.join(map(repr, unknown))} is not supported")
      return tuple(DCLevel(*row[:-1]) for row in zip(widths, *columns.values(), strict=True))

    out_activation = config.get("decoder_conv_act_fn", "relu")
    if out_activation not in _ACTIVATIONS:
      raise UserError(f"DC-AE config.json: decoder_conv_act_fn {out_activation!r} is not supported")
    return cls(
      encoder=levels("encoder", "rms_norm", "silu"),
      decoder=levels("decoder", config.get("decoder_norm_types", "rms_norm"), config.get("decoder_act_fns", "silu")),
      in_channels=config.get("in_channels", 3),
      latent_channels=config.get("latent_channels", 32),
      head_size=config.get("attention_head_dim", 32),
      unshuffle=config.get("downsample_block_type", "pixel_unshuffle") == "pixel_unshuffle",
      shuffle=config.get("upsample_block_type", "pixel_shuffle") != "interpolate",
      encoder_out_shortcut=config.get("encoder_out_shortcut", True),
      decoder_in_shortcut=config.get("decoder_in_shortcut", True),
      out_activation=out_activation,
      scaling_factor=config.get("scaling_factor", 1.0),
    )


def pixel_unshuffle(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B, H / 2, W / 2, 4 C], channels ordered (C, row, column), as torch does."""
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, h // 2, w // 2, 4 * c)


def pixel_shuffle(x: jax.Array) -> jax.Array:
  """The inverse of `pixel_unshuffle`."""
  b, h, w, c = x.shape
  return x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


def group_mean(x: jax.Array, channels: int) -> jax.Array:
  """Average neighbouring channels down to `channels`: [..., C] -> [..., channels]. The shortcut where width shrinks."""
  return jnp.mean(x.reshape(*x.shape[:-1], channels, -1), axis=-1)


def repeat_channels(x: jax.Array, channels: int) -> jax.Array:
  """Repeat every channel, up to `channels`: [..., C] -> [..., channels]. The shortcut where width grows."""
  return jnp.repeat(x, channels // x.shape[-1], axis=-1)


class _Layer(nn.Module):
  """A module of numbers in `dtype`, with parameters in `param_dtype`."""

  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @property
  def kinds(self) -> dict:
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class Down(_Layer):
  """Half the size: [B, H, W, C] -> [B, H / 2, W / 2, features], with the shortcut around it."""

  features: int = 0
  unshuffle: bool = False
  shortcut: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.unshuffle:
      y = pixel_unshuffle(Conv(self.features // 4, name="conv", **self.kinds)(x))
    else:
      y = Conv(self.features, stride=2, name="conv", **self.kinds)(x)
    return y + group_mean(pixel_unshuffle(x), self.features) if self.shortcut else y


class Up(_Layer):
  """Twice the size: [B, H, W, C] -> [B, 2H, 2W, features], with the shortcut around it."""

  features: int = 0
  shuffle: bool = False
  shortcut: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.shuffle:
      y = pixel_shuffle(Conv(4 * self.features, name="conv", **self.kinds)(x))
    else:  # every channel four times, laid out as four pixels: the nearest neighbour
      y = Conv(self.features, name="conv", **self.kinds)(pixel_shuffle(repeat_channels(x, 4 * x.shape[-1])))
    return y + pixel_shuffle(repeat_channels(x, 4 * self.features)) if self.shortcut else y


class ResBlock(_Layer):
  """x + norm(conv(act(conv(x)))): [B, H, W, C] -> [B, H, W, C]."""

  activation: str = "silu"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = _ACTIVATIONS[self.activation](Conv(x.shape[-1], name="conv1", **self.kinds)(x))
    y = Conv(x.shape[-1], use_bias=False, name="conv2", **self.kinds)(y)
    return x + RMSNorm(_EPS, use_bias=True, name="norm", **self.kinds)(y)


class EfficientViTBlock(_Layer):
  """Linear attention at several scales, then a gated convolution, each x + norm(f(x)): [B, H, W, C] -> [B, H, W, C]."""

  head_size: int = 32
  scales: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    size, heads = self.head_size, c // self.head_size
    norm = lambda name: RMSNorm(_EPS, use_bias=True, name=name, **self.kinds)
    dense = lambda name: Dense(heads * size, ("embed", "heads"), use_bias=False, name=name, **self.kinds)
    qkv = jnp.concatenate([dense(name)(x) for name in "qkv"], axis=-1)
    scaled = [self._scale(qkv, kernel, f"scale_{i}") for i, kernel in enumerate(self.scales)]
    # A head is cut from the concatenation: three neighbouring groups of channels, wherever q, k and v were.
    qkv = jnp.concatenate([qkv, *scaled], axis=-1).reshape(b, h * w, -1, 3, size)
    y = linear_attention(*(qkv[:, :, :, i] for i in range(3))).reshape(b, h, w, -1)
    x = x + norm("out_norm")(Dense(c, ("heads", "embed"), use_bias=False, name="out", **self.kinds)(y))
    return x + norm("mlp_norm")(GLUMBConv(4 * c, name="mlp", **self.kinds)(x))

  def _scale(self, qkv: jax.Array, kernel_size: int, name: str) -> jax.Array:
    """A depthwise convolution, then one matrix for every `head_size` channels: [B, H, W, 3 D] -> [B, H, W, 3 D]."""
    y = DepthwiseConv(kernel_size, use_bias=False, axis="heads", name=f"{name}_depthwise", **self.kinds)(qkv)
    init = nn.with_logical_partitioning(default_init, (None, "heads"))
    kernel = self.param(f"{name}_kernel", init, (self.head_size, qkv.shape[-1]), self.param_dtype).astype(self.dtype)
    kernel = kernel.reshape(self.head_size, -1, self.head_size)
    return jnp.einsum("bhwgi,igo->bhwgo", y.reshape(*y.shape[:3], *kernel.shape[1:]), kernel).reshape(qkv.shape)


class _Part(_Layer):
  """What encoder and decoder share. The layers are named as the reference numbers them: level, then place in it."""

  cfg: AutoencoderDCConfig | None = None

  def block(self, level: DCLevel, name: str) -> nn.Module:
    if level.block == "ResBlock":
      return ResBlock(activation=level.activation, name=name, **self.kinds)
    return EfficientViTBlock(head_size=self.cfg.head_size, scales=level.scales, name=name, **self.kinds)

  def down(self, features: int, name: str, shortcut: bool = True) -> Down:
    return Down(features=features, unshuffle=self.cfg.unshuffle, shortcut=shortcut, name=name, **self.kinds)

  def up(self, features: int, name: str, shortcut: bool = True) -> Up:
    return Up(features=features, shuffle=self.cfg.shuffle, shortcut=shortcut, name=name, **self.kinds)


class Encoder(_Part):
  """[B, H, W, 3] -> latents [B, h, w, c]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg, levels = self.cfg, self.cfg.encoder
    if levels[0].blocks:
      x = Conv(levels[0].width, name="conv_in", **self.kinds)(x)
    else:
      x = self.down(levels[1].width, "conv_in", shortcut=False)(x)
    for i, level in enumerate(levels):
      for j in range(level.blocks):
        x = self.block(level, f"down_{i}_{j}")(x)
      if level.blocks and i < len(levels) - 1:
        x = self.down(levels[i + 1].width, f"down_{i}_{level.blocks}")(x)
      x = nn.with_logical_constraint(x, IMAGE)
    y = Conv(cfg.latent_channels, name="conv_out", **self.kinds)(x)
    return y + group_mean(x, cfg.latent_channels) if cfg.encoder_out_shortcut else y


class Decoder(_Part):
  """Latents [B, h, w, c] -> [B, H, W, 3]."""

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    cfg, levels = self.cfg, self.cfg.decoder
    x = Conv(levels[-1].width, name="conv_in", **self.kinds)(z)
    if cfg.decoder_in_shortcut:
      x = x + repeat_channels(z, levels[-1].width)
    for i, level in reversed(list(enumerate(levels))):
      doubled = int(level.blocks > 0 and i < len(levels) - 1)
      if doubled:
        x = self.up(level.width, f"up_{i}_0")(x)
      for j in range(level.blocks):
        x = self.block(level, f"up_{i}_{j + doubled}")(x)
      x = nn.with_logical_constraint(x, IMAGE)
    x = _ACTIVATIONS[cfg.out_activation](RMSNorm(_EPS, use_bias=True, name="norm_out", **self.kinds)(x))
    if levels[0].blocks:
      return Conv(cfg.in_channels, name="conv_out", **self.kinds)(x)
    return self.up(cfg.in_channels, "conv_out", shortcut=False)(x)


class AutoencoderDC(nn.Module):
  """Images to latents and back. H and W are multiples of `cfg.downsampling`; h = H / cfg.downsampling."""

  cfg: AutoencoderDCConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    self.encoder = Encoder(cfg=self.cfg, dtype=self.dtype, param_dtype=self.param_dtype)
    self.decoder = Decoder(cfg=self.cfg, dtype=self.dtype, param_dtype=self.param_dtype)

  def encode(self, images: jax.Array) -> jax.Array:
    """images [B, H, W, 3] in -1..1 -> latents [B, h, w, c], before any scaling factor."""
    return self.encoder(images)

  def decode(self, latents: jax.Array) -> jax.Array:
    """latents [B, h, w, c], before any scaling factor -> images [B, H, W, 3], about -1..1, not clipped."""
    return self.decoder(latents)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Reconstruction: [B, H, W, 3] -> [B, H, W, 3]."""
    return self.decode(self.encode(images))
