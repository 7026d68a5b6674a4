"""Every published size, and the miniature. An experiment names a preset and overrides fields; there is no third way."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from blip3o_jax.diffusion.dpm_solver import DPMSolverConfig
from blip3o_jax.diffusion.euler_discrete import EulerDiscreteConfig
from blip3o_jax.errors import UserError
from blip3o_jax.models.autoencoder_dc import AutoencoderDCConfig, DCLevel
from blip3o_jax.models.autoencoder_kl import AutoencoderKLConfig
from blip3o_jax.models.blip3o import BackboneConfig, Blip3oConfig
from blip3o_jax.models.eva_clip import EvaClipConfig
from blip3o_jax.models.next_dit import NextDiTConfig
from blip3o_jax.models.qwen2_5_vl import Qwen25VLConfig, VisionConfig
from blip3o_jax.models.qwen3_siglip import Qwen3SiglipConfig
from blip3o_jax.models.sana import SanaConfig
from blip3o_jax.models.siglip import SiglipConfig
from blip3o_jax.models.text_decoder import RopeScaling, TextDecoderConfig
from blip3o_jax.models.text_tower import TextTowerConfig
from blip3o_jax.models.unet import UNetConfig
from blip3o_jax.nn.stack import REMAT_POLICIES

# EVA-CLIP-E/14+ at 448 pixels: 4,350,208,256 parameters (spec 5.1, 10.3).
EVA_CLIP_E = EvaClipConfig(
  image_size=448, patch_size=14, width=1792, layers=64, heads=16, mlp_dim=15360, pool_stride=4, remat="full"
)

# The decoder of Emu2-Gen: SDXL's UNet with CLIP features as context (spec 6.1), and SDXL's VAE.
SDXL_UNET = UNetConfig()
SDXL_VAE = AutoencoderKLConfig()

# The second pair of encoder and decoder (spec 7.1): SigLIP2-so400m/16 at 512 pixels, 428,772,800 parameters; Sana 1.6 B
# behind a connector, 1,604,462,752 and 7,969,536; and its autoencoder, 312,250,275 (dc-ae-f32c32-sana).
SIGLIP2_SO400M = SiglipConfig(
  image_size=512, patch_size=16, width=1152, layers=27, heads=16, mlp_dim=4304, remat="full"
)
SANA_1600M = SanaConfig(remat="full")
SIGLIP2_TARGET = dataclasses.replace(SIGLIP2_SO400M, head=False, pool_stride=4)


def _dc_levels(*blocks: int) -> tuple[DCLevel, ...]:
  widths = (128, 256, 512, 512, 1024, 1024)
  coarse = {"block": "EfficientViTBlock", "scales": (5,)}
  return tuple(DCLevel(w, n, **(coarse if i > 2 else {})) for i, (w, n) in enumerate(zip(widths, blocks, strict=True)))


DC_AE_F32C32 = AutoencoderDCConfig(encoder=_dc_levels(2, 2, 2, 3, 3, 3), decoder=_dc_levels(3, 3, 3, 3, 3, 3))


def _qwen(dim: int, layers: int, heads: int, kv_heads: int, mlp_dim: int, tied: bool) -> Qwen25VLConfig:
  """Qwen2.5-VL-Instruct with the release's vocabulary of 151,668 (spec 4.1, 10.4)."""
  text = TextDecoderConfig(
    vocab=151668,
    dim=dim,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_size=128,
    mlp_dim=mlp_dim,
    rope_theta=1e6,
    rope_sections=(16, 24, 24),
    norm_eps=1e-6,
    tie_embeddings=tied,
    qkv_bias=True,
    remat="full",
  )
  return Qwen25VLConfig(text=text, vision=VisionConfig(out_dim=dim, remat="full"))


QWEN_7B = _qwen(3584, 28, 28, 4, 18944, tied=False)
QWEN_3B = _qwen(2048, 36, 16, 2, 11008, tied=True)


# Qwen3-1.7B and SigLIP2 (spec part 8). Qwen3's tokenizer has 151,669 entries, so the three added tokens are the last
# of 151,672; 1,720,574,976 parameters with the 151,936 rows of the public checkpoint.
QWEN3_1_7B = TextDecoderConfig(
  vocab=151672,
  dim=2048,
  layers=28,
  heads=16,
  kv_heads=8,
  head_size=128,
  mlp_dim=6144,
  rope_theta=1e6,
  norm_eps=1e-6,
  tie_embeddings=True,
  qk_norm=True,
  remat="full",
)
QWEN3_SIGLIP2 = Qwen3SiglipConfig(text=QWEN3_1_7B, vision=dataclasses.replace(SIGLIP2_SO400M, head=False))

# Llama-3.2-1B, of the paper's design study (spec 11.4): 1,235,814,400 parameters without the three added tokens.
LLAMA_1B = TextDecoderConfig(
  vocab=128259,
  dim=2048,
  layers=16,
  heads=32,
  kv_heads=8,
  head_size=64,
  mlp_dim=8192,
  rope_theta=5e5,
  rope_scaling=RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192),
  norm_eps=1e-5,
  tie_embeddings=True,
  remat="full",
)


def _next_dit(condition_dim: int, paper: bool) -> NextDiTConfig:
  """The 1.4 B DiT: as released (two-axis table, full heads) or as the paper says (three axes, grouped queries)."""
  return NextDiTConfig(
    in_channels=1792,
    grid=(8, 8),
    dim=1792,
    layers=24,
    heads=28,
    kv_heads=7 if paper else 28,
    ffn_dim=4864,
    condition_dim=condition_dim,
    rope="concatenated" if paper else "interleaved",
    rope_split=(16, 24, 24) if paper else None,
    remat="full",
  )


def _blip3o(backbone: BackboneConfig, paper: bool) -> Blip3oConfig:
  return Blip3oConfig(
    backbone=backbone, dit=_next_dit(backbone.dim, paper), clip=EVA_CLIP_E, unet=SDXL_UNET, vae=SDXL_VAE
  )


def _siglip2_sana() -> Blip3oConfig:
  """SigLIP2 understands, its pooled features are drawn, and Sana makes pixels of them (spec 7, 8). A DiT of 1152
  channels, which the branch leaves to do."""
  base = _blip3o(QWEN3_SIGLIP2, paper=False)
  return dataclasses.replace(
    base,
    dit=dataclasses.replace(base.dit, in_channels=SIGLIP2_TARGET.width),
    clip=SIGLIP2_TARGET,
    unet=SANA_1600M,
    vae=DC_AE_F32C32,
    decoder_process=DPMSolverConfig(),
    image_size=512,
  )


def _micro() -> Blip3oConfig:
  """The miniature for the shapes world: the same code with small numbers, in the paper's form (DESIGN part 4)."""
  vocab = 640
  text = TextDecoderConfig(
    vocab=vocab,
    dim=128,
    layers=4,
    heads=4,
    kv_heads=2,
    head_size=32,
    mlp_dim=384,
    rope_theta=1e4,
    rope_sections=(4, 6, 6),
    norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=True,
  )
  vision = VisionConfig(
    patch_size=8, dim=96, layers=4, heads=4, mlp_dim=256, window_size=32, full_layers=(1, 3), out_dim=128
  )
  tower = TextDecoderConfig(
    vocab=vocab,
    dim=96,
    layers=2,
    heads=4,
    kv_heads=4,
    head_size=24,
    mlp_dim=256,
    rope_theta=1e4,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=False,
  )
  return Blip3oConfig(
    # The built-in tokenizer (data.shapes_corpus) ends with ten special tokens, 630..639.
    backbone=Qwen25VLConfig(
      text=text, vision=vision, image_token=635, video_token=636, vision_start=633, vision_end=634
    ),
    dit=NextDiTConfig(
      in_channels=96,
      grid=(4, 4),
      dim=192,
      layers=4,
      heads=6,
      kv_heads=2,
      ffn_dim=512,
      condition_dim=128,
      rope="concatenated",
      rope_split=(8, 12, 12),
      rope_theta=10.0,  # the grid is 4 wide: with 10,000 most channels would say nothing of the place
    ),
    clip=EvaClipConfig(
      image_size=64, patch_size=16, width=96, layers=4, heads=4, mlp_dim=288, pool_stride=1, norm_init=0.3
    ),
    unet=UNetConfig(
      block_out_channels=(48, 96),
      layers_per_block=1,
      depths=(0, 1),
      mid_depth=1,
      heads=(2, 3),
      context_dim=96,
      time_id_size=32,
      norm_groups=8,
      position_code=True,
      tie_query_key_init=True,
    ),
    vae=AutoencoderKLConfig(
      block_out_channels=(48,), layers_per_block=1, norm_groups=8, mid_attention=False, patch_size=4, scaling_factor=1.0
    ),
    decoder_process=EulerDiscreteConfig(prediction="v_prediction"),
    text_tower=TextTowerConfig(text=tower, dim=64, patch_dim=768),
    queries=16,
    image_size=64,
  )


PRESETS: dict[str, Callable[[], Blip3oConfig]] = {
  "blip3o-8b": lambda: _blip3o(QWEN_7B, paper=False),
  "blip3o-4b": lambda: _blip3o(QWEN_3B, paper=False),
  "blip3o-8b-paper": lambda: _blip3o(QWEN_7B, paper=True),
  "blip3o-4b-paper": lambda: _blip3o(QWEN_3B, paper=True),
  "blip3o-study": lambda: _blip3o(LLAMA_1B, paper=True),
  "blip3o-qwen3-siglip2": lambda: _blip3o(QWEN3_SIGLIP2, paper=False),
  "blip3o-siglip2-sana": _siglip2_sana,
  "micro": _micro,
}


def get(name: str, overrides: Mapping[str, Any] | None = None) -> Blip3oConfig:
  """The preset `name` with a nested dict of overrides, e.g. {"dit": {"layers": 12}}.

  Raises:
    UserError: unknown preset or field.
  """
  if name not in PRESETS:
    raise UserError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
  return _replace(PRESETS[name](), overrides or {}, "model")


def with_remat(config: Any, name: str) -> Any:
  """`config` with every stack of layers under the remat policy `name` (nn.stack).

  Raises:
    UserError: no such policy.
  """
  if name not in REMAT_POLICIES:
    raise UserError(f"config.remat {name!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}")
  changes = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name == "remat":
      changes["remat"] = name
    elif dataclasses.is_dataclass(value):
      changes[field.name] = with_remat(value, name)
  return dataclasses.replace(config, **changes)


def difference(base: Any, config: Any) -> dict[str, Any]:
  """The overrides that make `base` into `config`, a config of the same kind. How much is recomputed does not count."""
  changes = {}
  for field in dataclasses.fields(base):
    old, new = getattr(base, field.name), getattr(config, field.name)
    if field.name == "remat" or old == new:
      continue
    alike = dataclasses.is_dataclass(old) and type(old) is type(new)
    if value := difference(old, new) if alike else {"": new}:
      changes[field.name] = value if alike else new
  return changes


def _replace(config: Any, overrides: Mapping[str, Any], path: str) -> Any:
  fields = {f.name for f in dataclasses.fields(config)}
  changes = {}
  for key, value in overrides.items():
    if key not in fields:
      raise UserError(f"{path}.{key} is not a field of {type(config).__name__}; it has {', '.join(sorted(fields))}")
    old = getattr(config, key)
    if isinstance(value, Mapping):
      if not dataclasses.is_dataclass(old):
        raise UserError(f"{path}.{key} is {old!r}, which has no fields {', '.join(value)} to set; give one value")
      value = _replace(old, value, f"{path}.{key}")
    elif dataclasses.is_dataclass(old) and not (value is None or dataclasses.is_dataclass(value)):
      raise UserError(f"{path}.{key} is {value!r}; give a group of fields of {type(old).__name__}")
    elif isinstance(value, list):  # JSON has no tuples, and configs must hash
      value = tuple(value)
    changes[key] = value
  return dataclasses.replace(config, **changes)
