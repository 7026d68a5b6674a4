"""The sizes that are measured, and random weights for them.

`MID` is the release in small, for a CPU: the same structure and the same numbers of tokens (1025 in the encoder, 64
queries, 64 latents), widths and depths cut so that two cores take seconds and the parts keep their shares of a training
step (benchmarks.train_step). Encoder 93 M parameters, backbone 160 M and 27 M of vocabulary, DiT 42 M, UNet 66 M.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.models import presets
from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.porting.source import abstract_params
from blip3o_jax.types import Params

REAL = {"4b": "blip3o-4b", "8b": "blip3o-8b"}

MID = {  # overrides of the preset "blip3o-4b"
  "backbone": {
    "text": {
      "vocab": 13184,
      "dim": 1024,
      "layers": 8,
      "heads": 8,
      "kv_heads": 2,
      "head_size": 128,
      "mlp_dim": 5632,
      "tie_embeddings": False,
    },
    "vision": {"dim": 256, "layers": 4, "heads": 4, "mlp_dim": 768, "full_layers": (1, 3), "out_dim": 1024},
    "image_token": 635,
    "video_token": 636,
    "vision_start": 633,
    "vision_end": 634,
  },
  "dit": {
    "in_channels": 448,
    "dim": 448,
    "layers": 10,
    "heads": 7,
    "kv_heads": 7,
    "ffn_dim": 1280,
    "condition_dim": 1024,
  },
  "clip": {"width": 448, "layers": 22, "heads": 4, "mlp_dim": 3840},
  "unet": {
    "block_out_channels": (96, 192, 384),
    "depths": (0, 1, 2),
    "mid_depth": 2,
    "heads": (2, 3, 6),
    "context_dim": 448,
    "time_id_size": 64,
  },
  "vae": {"block_out_channels": (32, 64, 128, 128)},
  "image_size": 256,
}


def architecture(preset: str = "") -> Blip3oConfig:
  """The model of a key of REAL, or `MID`."""
  return presets.get(REAL[preset]) if preset else presets.get("blip3o-4b", MID)


def dtype_of(preset: str) -> str:
  """What a size is measured in."""
  return "bfloat16" if preset else "float32"


def weights(cfg: Blip3oConfig, components: Sequence[str], dtype: str, seed: int = 0) -> Params:
  """Random {component: tree}: kernels of variance 1 / fan-in, and nothing at its usual zero or one, so that every part
  of a network bears on what comes out. The same numbers again and again, from another place on for each array: to draw
  billions takes a host minutes, and to compile a draw for every shape takes a device as long."""
  rng = np.random.default_rng(seed)
  numbers = rng.standard_normal((1 << 22) + 1, np.float32)

  def draw(path, leaf):
    name, places = path[-1].key, np.arange(min(leaf.size, numbers.size)) - rng.integers(numbers.size)
    noise = numbers.take(places, mode="wrap")
    if name == "kernel":
      fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[-2]  # a convolution's, or a matrix's
      noise *= np.float32(fan_in**-0.5)
    else:
      noise *= np.float32({"scale": 0.1, "gate": 0.5, "latent_queries": 1.0}.get(name, 0.02))
      noise += np.float32(name == "scale")
    return jnp.asarray(np.resize(noise, leaf.shape)).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg, components, jnp.dtype(dtype)))
