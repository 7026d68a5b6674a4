"""The whole model with every number small, and weights drawn on the host: nothing is compiled to make it."""

import functools

import jax
import numpy as np

from blip3o_jax.diffusion.dpm_solver import DPMSolverConfig
from blip3o_jax.models import presets
from blip3o_jax.models.autoencoder_dc import AutoencoderDCConfig, DCLevel
from blip3o_jax.models.blip3o import COMPONENTS, Blip3o, Blip3oConfig
from blip3o_jax.models.qwen3_siglip import Qwen3SiglipConfig
from blip3o_jax.models.sana import SanaConfig
from blip3o_jax.models.siglip import SiglipConfig
from blip3o_jax.models.text_decoder import RopeScaling, TextDecoderConfig
from blip3o_jax.porting import source

# Of the preset "micro". Pictures 16 x 16, encoder tokens 4 x 4 pooled to 2 x 2, latents 4 x 4.
OVERRIDES = {
  "backbone": {
    "text": {
      "dim": 32,
      "layers": 1,
      "heads": 2,
      "kv_heads": 1,
      "head_size": 16,
      "mlp_dim": 32,
      "rope_sections": [2, 3, 3],
    },
    "vision": {"dim": 32, "layers": 2, "heads": 2, "mlp_dim": 32, "full_layers": [1], "out_dim": 32},
  },
  "dit": {
    "in_channels": 16,
    "grid": [2, 2],
    "dim": 32,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "ffn_dim": 32,
    "condition_dim": 32,
    "rope_split": [4, 6, 6],
  },
  "clip": {
    "image_size": 16,
    "patch_size": 4,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "mlp_dim": 16,
    "pool_stride": 2,
    "norm_init": 1.0,
  },
  "unet": {
    "block_out_channels": [16],
    "depths": [1],
    "mid_depth": 1,
    "heads": [2],
    "context_dim": 16,
    "time_id_size": 4,
    "norm_groups": 4,
  },
  "vae": {"block_out_channels": [8], "norm_groups": 4},
  "text_tower": {
    "text": {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_size": 8, "mlp_dim": 16},
    "dim": 8,
    "patch_dim": 192,
  },
  "queries": 4,
  "image_size": 16,
}

# The backbones beside the miniature's own Qwen2.5-VL: overrides of the field `backbone`. The scaled frequencies lie on
# both sides of what is kept.
_TEXT = {"vocab": 640, "dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_size": 16, "mlp_dim": 32}
BACKBONES = {
  "qwen2_5_vl": {},
  "qwen3_siglip": {
    "backbone": Qwen3SiglipConfig(
      text=TextDecoderConfig(**_TEXT, qk_norm=True, tie_embeddings=True),
      vision=SiglipConfig(image_size=8, patch_size=4, width=16, layers=1, heads=2, mlp_dim=16, head=False),
      image_token=639,
    )
  },
  "llama": {
    "backbone": TextDecoderConfig(
      **_TEXT, rope_theta=100.0, tie_embeddings=True, rope_scaling=RopeScaling(factor=32.0, original_length=64)
    )
  },
}


# What else a model may be: overrides of whole fields, as above. Latents of the Sana pair are 8 x 8.
VARIANTS = BACKBONES | {
  "clip_mse": {"design": "clip_mse"},
  "vae_flow": {"design": "vae_flow", "dit": OVERRIDES["dit"] | {"in_channels": 4, "grid": [4, 4]}},
  "sana": {
    "clip": SiglipConfig(
      image_size=16, patch_size=4, width=16, layers=2, heads=2, mlp_dim=16, head=False, pool_stride=2
    ),
    "unet": SanaConfig(
      in_channels=4,
      out_channels=4,
      layers=1,
      heads=2,
      head_size=8,
      cross_heads=2,
      cross_head_size=8,
      mlp_dim=16,
      condition_dim=16,
      source_dim=16,
    ),
    "vae": AutoencoderDCConfig(
      (DCLevel(8, 1), DCLevel(8, 1)), (DCLevel(8, 1), DCLevel(8, 1)), latent_channels=4, head_size=4
    ),
    "decoder_process": DPMSolverConfig(),
  },
}


def variant(*names) -> dict:
  """The overrides of several variants, the later ones upon the earlier."""
  return functools.reduce(lambda a, b: a | VARIANTS[b], names, {})


def written(*names) -> dict:
  """`preset` and `overrides`, as files hold them, of a model of these variants; its CLIP encoder is ready-made."""
  cfg = config(**variant(*names), text_tower=None)
  preset = {"llama": "blip3o-study", "qwen3_siglip": "blip3o-qwen3-siglip2"}
  name = "blip3o-siglip2-sana" if "sana" in names else next((preset[n] for n in names if n in preset), "blip3o-4b")
  return {"preset": name, "overrides": presets.difference(presets.get(name), cfg)}


def config(**changes) -> Blip3oConfig:
  """`changes` are overrides of whole fields."""
  return presets.get("micro", OVERRIDES | changes)


def model(**changes) -> Blip3o:
  return Blip3o(config(**changes))


@functools.cache
def params(seed: int = 0, *variants: str):
  """{component: tree} of all components: kernels of variance 1 / fan-in, nothing at its usual zero or one."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    noise = rng.standard_normal(x.shape).astype(np.float32)
    name = path[-1].key
    if name == "kernel":
      return noise / np.sqrt(np.float32(np.prod(x.shape[-2:-1])))
    return 1 + 0.1 * noise if name == "scale" else 0.5 * noise

  return jax.tree_util.tree_map_with_path(draw, source.abstract_params(config(**variant(*variants)), COMPONENTS))


_jit = jax.jit  # a test may put the function below in its place


def quick_jit(f, **kwargs):
  """jax.jit for what runs once: the compiler does not optimise, which is most of its time."""
  options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
  return _jit(f, compiler_options=options, **kwargs)


def pixels(batch: int, seed: int = 0) -> np.ndarray:
  """uint8 [B, 16, 16, 3]."""
  return np.random.default_rng(seed).integers(0, 256, (batch, 16, 16, 3), dtype=np.uint8)


def prompts(lengths, *, pad_to: int, side: str = "right", seed: int = 0):
  """tokens, mask [B, L], positions [B, 3, L] of random prompts; each row counts its own tokens."""
  rng = np.random.default_rng(seed)
  mask = np.arange(pad_to) < np.asarray(lengths)[:, None]
  rows = rng.integers(0, 600, (len(lengths), pad_to))
  tokens = np.where(mask, rows, 630)
  if side == "left":
    turn = lambda x: np.stack([np.roll(row, pad_to - n) for row, n in zip(x, lengths, strict=True)])
    tokens, mask = turn(tokens), turn(mask)
  positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
  return tokens.astype(np.int32), mask, np.repeat(positions[:, None], 3, axis=1).astype(np.int32)
