"""Floating-point operations of a forward pass, by part, for one example, as functions of configs and lengths.

Products alone are counted (matrix products, convolutions, the two products of attention), two operations for a multiply
and an add; norms, activations, tables and depthwise convolutions are left out. Attention counts every pair of query and
key, masked or not, as model FLOP/s utilisation is usually stated (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
What a backward pass costs is `training_flops`.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from blip3o_jax.models.autoencoder_dc import AutoencoderDCConfig, DCLevel
from blip3o_jax.models.autoencoder_kl import AutoencoderKLConfig
from blip3o_jax.models.blip3o import BackboneConfig
from blip3o_jax.models.eva_clip import EvaClipConfig
from blip3o_jax.models.next_dit import TIME_FEATURES, NextDiTConfig
from blip3o_jax.models.qwen2_5_vl import Qwen25VLConfig, VisionConfig
from blip3o_jax.models.qwen3_siglip import Qwen3SiglipConfig
from blip3o_jax.models.sana import TIME_FEATURES as SANA_TIME_FEATURES
from blip3o_jax.models.sana import SanaConfig
from blip3o_jax.models.siglip import SiglipConfig
from blip3o_jax.models.text_decoder import TextDecoderConfig
from blip3o_jax.models.text_tower import TextTowerConfig
from blip3o_jax.models.unet import UNetConfig


@dataclasses.dataclass(frozen=True)
class Pass:
  """One pass of an example through a component.

  Attributes:
    component: of the parameter tree; flops: of the forward pass.
    gradient: whether the loss depends on it, so that a gradient comes back through its products.
  """

  component: str
  flops: float
  gradient: bool = True


def training_flops(passes: Iterable[Pass], trained: Collection[str]) -> float:
  """Operations of one example in a training step, of the mathematics alone: what remat computes again is no gain.

  Each product of a forward pass costs as much again for the gradient of its input, where a gradient comes through, and
  as much again for that of its weights, where the component trains. (The first layer that trains needs no gradient of
  its input; that is counted all the same.)
  """
  return sum(p.flops * (1 + (1 + (p.component in trained) if p.gradient else 0)) for p in passes)


def matmul(rows: float, *widths: int) -> float:
  """`rows` vectors through matrices [widths[0], widths[1]], [widths[1], widths[2]], ..."""
  return 2.0 * rows * sum(a * b for a, b in zip(widths, widths[1:], strict=False))


def attention(queries: int, keys: int, width: int) -> float:
  """Scores and weighted sums, `width` = heads * head size of the queries."""
  return 4.0 * queries * keys * width


def linear_attention(length: int, width: int, head_size: int) -> float:
  """Attention whose sums over keys are taken first."""
  return 2.0 * length * width * (2 * head_size + 1)


def text_decoder(cfg: TextDecoderConfig, length: int, cached: int = 0) -> float:
  """`length` new tokens that see each other and `cached` earlier ones; without logits."""
  wide, narrow = cfg.heads * cfg.head_size, cfg.kv_heads * cfg.head_size
  layer = matmul(length, cfg.dim, 2 * wide + 2 * narrow) + attention(length, length + cached, wide)
  return cfg.layers * (layer + 3 * matmul(length, cfg.dim, cfg.mlp_dim))


def text_logits(cfg: TextDecoderConfig, length: int) -> float:
  """The head over the vocabulary at `length` places."""
  return matmul(length, cfg.dim, cfg.vocab)


def text_of(backbone: BackboneConfig) -> TextDecoderConfig:
  """The text decoder of a backbone, which some are themselves."""
  return getattr(backbone, "text", backbone)


def vision(backbone: BackboneConfig, shapes: Mapping[str, tuple[int, ...]]) -> float:
  """A backbone's tower over the pictures of one row of a batch with these shapes (0 if it sees none)."""
  if isinstance(backbone, Qwen25VLConfig) and "patches" in shapes:
    return qwen_vision(backbone.vision, shapes["patches"][1])
  if isinstance(backbone, Qwen3SiglipConfig) and "images" in shapes:
    tokens = backbone.vision.side**2
    projector = matmul(tokens, backbone.vision.width, backbone.dim, backbone.dim)
    return shapes["images"][1] * (clip_encoder(backbone.vision) + projector)
  return 0.0


def qwen_vision(cfg: VisionConfig, patches: int) -> float:
  """Qwen2.5-VL's tower and merger over `patches` of one picture; windows count as windows, though masked here."""
  window = min(patches, (cfg.window_size // cfg.patch_size) ** 2)
  full = len([i for i in cfg.full_layers if i < cfg.layers])
  attend = full * attention(patches, patches, cfg.dim) + (cfg.layers - full) * attention(patches, window, cfg.dim)
  layer = matmul(patches, cfg.dim, 4 * cfg.dim) + 3 * matmul(patches, cfg.dim, cfg.mlp_dim)
  merged = cfg.dim * cfg.merge_size**2
  merger = matmul(patches / cfg.merge_size**2, merged, merged, cfg.out_dim)
  return matmul(patches, cfg.patch_dim, cfg.dim) + cfg.layers * layer + attend + merger


def clip_encoder(cfg: EvaClipConfig | SiglipConfig) -> float:
  """EVA-CLIP, or SigLIP without its pooling head, on one picture."""
  patches = cfg.side**2
  tokens = patches + isinstance(cfg, EvaClipConfig)  # its class token
  layer = matmul(tokens, cfg.width, 4 * cfg.width) + attention(tokens, tokens, cfg.width)
  layer += matmul(tokens, cfg.width, cfg.mlp_dim, cfg.width)
  return matmul(patches, cfg.patch_size**2 * 3, cfg.width) + cfg.layers * layer


def text_tower(cfg: TextTowerConfig, length: int, tokens: int, channels: int) -> float:
  """The contrastive stage's tower: a caption of `length`, then it and the patches read from `tokens` features."""
  text, both = cfg.text, length + tokens
  contrast = text_decoder(text, length) + matmul(1, text.dim, cfg.dim) + matmul(1, channels, cfg.dim)
  caption = matmul(tokens, channels, text.dim) + text_decoder(text, both) + text_logits(text, length)
  return contrast + caption + matmul(tokens, channels, cfg.patch_dim)


def next_dit(cfg: NextDiTConfig, condition: int) -> float:
  """The DiT on one latent of `cfg.grid`, with `condition` tokens to attend to."""
  (h, w), p, dim, time = cfg.grid, cfg.patch_size, cfg.dim, cfg.time_dim
  n, wide, narrow = h * w // p**2, cfg.dim, cfg.kv_heads * cfg.head_size
  layer = matmul(1, time, 4 * dim) + matmul(n, dim, 2 * wide + 2 * narrow + dim) + matmul(condition, dim, 2 * narrow)
  layer += attention(n, n + condition, wide) + 3 * matmul(n, dim, cfg.ffn_dim)
  once = matmul(condition, cfg.condition_dim, dim, dim) + matmul(1, TIME_FEATURES, time, time) + matmul(1, dim, time)
  patch = p**2 * cfg.in_channels
  return cfg.layers * layer + once + matmul(n, patch, dim) + matmul(1, time, dim) + matmul(n, dim, patch)


def denoiser(cfg: UNetConfig | SanaConfig, side: int, context: int) -> float:
  """What draws latents of `side` x `side` from `context` tokens, UNet or Sana: one call."""
  return sana(cfg, side, context) if isinstance(cfg, SanaConfig) else unet(cfg, side, context)


def sana(cfg: SanaConfig, side: int, context: int) -> float:
  """Sana with its connector."""
  patch, dim, cross = cfg.patch_size**2, cfg.dim, cfg.cross_heads * cfg.cross_head_size
  n = side**2 // patch
  layer = matmul(n, dim, 3 * dim) + linear_attention(n, dim, cfg.head_size) + matmul(n, dim, dim)
  layer += matmul(n, dim, cross, dim) + matmul(context, dim, 2 * cross) + attention(n, context, cross)
  layer += matmul(n, dim, 2 * cfg.mlp_dim) + matmul(n, cfg.mlp_dim, dim)
  read = matmul(context, cfg.condition_dim, dim, dim)
  if cfg.source_dim:
    read += matmul(context, cfg.source_dim, cfg.condition_dim, cfg.condition_dim)
  time = matmul(1, SANA_TIME_FEATURES, dim, dim, 6 * dim)
  ends = matmul(n, patch * cfg.in_channels, dim) + matmul(n, dim, patch * cfg.out_channels)
  return cfg.layers * layer + read + time + ends


def unet(cfg: UNetConfig, side: int, context: int) -> float:
  """The UNet."""
  widths, time = cfg.block_out_channels, 4 * cfg.block_out_channels[0]

  def block(side: int, cin: int, cout: int, depth: int) -> float:
    return _resnet(side, cin, cout) + matmul(1, time, cout) + transformer(side, cout, depth)

  def transformer(side: int, dim: int, depth: int) -> float:
    n = side**2
    layer = matmul(n, dim, 6 * dim) + matmul(context, cfg.context_dim, 2 * dim) + attention(n, n + context, dim)
    layer += matmul(n, dim, 8 * dim) + matmul(n, 4 * dim, dim)
    return (2 * matmul(n, dim, dim) + depth * layer) if depth else 0.0

  total = matmul(1, widths[0], time, time) + _conv(side, cfg.in_channels, widths[0])
  if cfg.time_id_size:
    total += matmul(1, cfg.context_dim + 6 * cfg.time_id_size, time, time)
  width, skips = widths[0], [widths[0]]
  for i, out in enumerate(widths):
    for _ in range(cfg.layers_per_block):
      total += block(side, width, out, cfg.depths[i])
      width = out
      skips.append(out)
    if i < len(widths) - 1:
      side //= 2
      total += _conv(side, out, out)
      skips.append(out)
  total += block(side, width, width, cfg.mid_depth) + block(side, width, width, 0)
  for i, out in reversed(list(enumerate(widths))):
    for _ in range(cfg.layers_per_block + 1):
      total += block(side, width + skips.pop(), out, cfg.depths[i])
      width = out
    if i:
      total += _upsample(side, out)
      side *= 2
  return total + _conv(side, width, cfg.out_channels)


def vae_encode(cfg: AutoencoderKLConfig | AutoencoderDCConfig, side: int) -> float:
  """A picture of `side` x `side` pixels to latents."""
  return _dc_encode(cfg, side) if isinstance(cfg, AutoencoderDCConfig) else _kl_encode(cfg, side)


def vae_decode(cfg: AutoencoderKLConfig | AutoencoderDCConfig, side: int) -> float:
  """Latents to a picture of `side` x `side` pixels."""
  return _dc_decode(cfg, side) if isinstance(cfg, AutoencoderDCConfig) else _kl_decode(cfg, side)


def _kl_encode(cfg: AutoencoderKLConfig, side: int) -> float:
  side, widths = side // cfg.patch_size, cfg.block_out_channels
  width = widths[0]
  total = _conv(side, cfg.in_channels * cfg.patch_size**2, width)
  for i, out in enumerate(widths):
    for _ in range(cfg.layers_per_block):
      total += _resnet(side, width, out)
      width = out
    if i < len(widths) - 1:
      side //= 2
      total += _conv(side, out, out)
  latent = 2 * cfg.latent_channels
  total += _vae_middle(cfg, side, width) + _conv(side, width, latent)
  return total + (matmul(side**2, latent, latent) if cfg.quant_conv else 0.0)


def _kl_decode(cfg: AutoencoderKLConfig, side: int) -> float:
  side, widths = side // cfg.downsampling, cfg.block_out_channels[::-1]
  width = widths[0]
  total = matmul(side**2, cfg.latent_channels, cfg.latent_channels) if cfg.post_quant_conv else 0.0
  total += _conv(side, cfg.latent_channels, width) + _vae_middle(cfg, side, width)
  for i, out in enumerate(widths):
    for _ in range(cfg.layers_per_block + 1):
      total += _resnet(side, width, out)
      width = out
    if i < len(widths) - 1:
      total += _upsample(side, out)
      side *= 2
  return total + _conv(side, width, cfg.in_channels * cfg.patch_size**2)


def _conv(side: int, cin: int, cout: int, kernel: int = 3) -> float:
  """A convolution that leaves `side` x `side` places."""
  return matmul(side**2, kernel**2 * cin, cout)


def _upsample(side: int, width: int) -> float:
  """To twice the side, as nn.linear.UpsampleConv does it: four phases, each a 2x2 convolution."""
  return matmul((side + 1) ** 2, 4 * width, 4 * width)


def _resnet(side: int, cin: int, cout: int) -> float:
  shortcut = _conv(side, cin, cout, 1) if cin != cout else 0.0
  return _conv(side, cin, cout) + _conv(side, cout, cout) + shortcut


def _vae_middle(cfg: AutoencoderKLConfig, side: int, width: int) -> float:
  attend = matmul(side**2, width, 4 * width) + attention(side**2, side**2, width) if cfg.mid_attention else 0.0
  return 2 * _resnet(side, width, width) + attend


def _dc_encode(cfg: AutoencoderDCConfig, side: int) -> float:
  levels = cfg.encoder
  down = lambda side, cin, cout: _conv(side, cin, cout // 4) if cfg.unshuffle else _conv(side // 2, cin, cout)
  if levels[0].blocks:
    total = _conv(side, cfg.in_channels, levels[0].width)
  else:
    total = down(side, cfg.in_channels, levels[1].width)
  for i, level in enumerate(levels):
    total += level.blocks * _dc_block(cfg, level, side)
    if i < len(levels) - 1:
      total += down(side, level.width, levels[i + 1].width) if level.blocks else 0.0
      side //= 2
  return total + _conv(side, levels[-1].width, cfg.latent_channels)


def _dc_decode(cfg: AutoencoderDCConfig, side: int) -> float:
  levels, side = cfg.decoder, side // cfg.downsampling
  up = lambda side, cin, cout: _conv(side, cin, 4 * cout) if cfg.shuffle else _conv(2 * side, cin, cout)
  width = levels[-1].width
  total = _conv(side, cfg.latent_channels, width)
  for i, level in reversed(list(enumerate(levels))):
    if level.blocks and i < len(levels) - 1:
      total += up(side, width, level.width)
      side, width = 2 * side, level.width
    total += level.blocks * _dc_block(cfg, level, side)
  return total + (_conv(side, width, cfg.in_channels) if levels[0].blocks else up(side, width, cfg.in_channels))


def _dc_block(cfg: AutoencoderDCConfig, level: DCLevel, side: int) -> float:
  n, width = side**2, level.width
  if level.block == "ResBlock":
    return 2 * _conv(side, width, width)
  scaled = len(level.scales) * matmul(n, 3 * width, cfg.head_size)
  wide = width * (1 + len(level.scales))
  attend = matmul(n, width, 3 * width) + scaled + linear_attention(n, wide, cfg.head_size) + matmul(n, wide, width)
  return attend + matmul(n, width, 8 * width) + matmul(n, 4 * width, width)
