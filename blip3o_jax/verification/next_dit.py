"""The diffusion transformer: velocity, gradients, rotary table and activations of single layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import UserError
from blip3o_jax.models.next_dit import NextDiT, NextDiTConfig, rope_phases
from blip3o_jax.porting.safetensors_io import Renamed
from blip3o_jax.verification.recording import TRAJECTORY, Recording, load_params, nchw, nhwc, shapes, sown

_ANCHOR = "patch_embedder.proj.weight"  # a key that every DiT has: what stands before it is the prefix


@dataclasses.dataclass(frozen=True)
class LoadedDiT:
  """A DiT with the weights of a recording; `prefix` is what its keys start with there ("model." in its own table)."""

  model: NextDiT
  params: Any
  prefix: str

  def __call__(self, params: Any, x: jax.Array, t: jax.Array, condition: jax.Array) -> jax.Array:
    return self.model.apply({"params": params}, x, t, condition)

  def key(self, _: str, key: str) -> str:
    """Name of a weight in the recording, from that in the release."""
    return self.prefix + key.removeprefix("model.")


def load(rec: Recording, config: Mapping[str, Any], reader: Any) -> LoadedDiT:
  """The DiT among the weights of a recording, under whatever prefix."""
  prefixes = [key.removesuffix(_ANCHOR) for key in reader if key.endswith(_ANCHOR)]
  if len(prefixes) != 1:
    raise UserError(f"the weights hold {len(prefixes)} diffusion transformers ({_ANCHOR}); expected one")
  prefix = prefixes[0]
  part = Renamed(reader, {"model." + key.removeprefix(prefix): key for key in reader if key.startswith(prefix)})
  cfg = rec.build(NextDiTConfig.from_reference, config, shapes(part))
  model = NextDiT(cfg)
  zeros = (jnp.zeros((1, *cfg.grid, cfg.in_channels)), jnp.zeros(1), jnp.zeros((1, 1, cfg.condition_dim)))
  return LoadedDiT(model, load_params("dit", part, model, *zeros), prefix)


def check(rec: Recording) -> None:
  dit = load(rec, rec.config, rec.weights())
  cfg = dit.model.cfg
  x, t, z = nhwc(rec.input("x")), jnp.asarray(rec.input("timestep")), jnp.asarray(rec.input("z_latents"))

  forward = lambda p: dit.model.apply({"params": p}, x, t, z, mutable=["intermediates"])
  output, state = jax.jit(forward)(dit.params)
  rec.compare("output", nchw(output))
  loss = lambda p, z: jnp.mean(jnp.square(dit(p, x, t, z)))
  value, (grads, grad_z) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(dit.params, z)
  rec.compare("loss", value)
  rec.compare("grad_z_latents", grad_z, TRAJECTORY)
  rec.compare_gradients({"dit": grads}, dit.key)

  h, w = x.shape[1] // cfg.patch_size, x.shape[2] // cfg.patch_size
  phase = np.asarray(rope_phases(cfg, h, w)).reshape(h, w, -1)
  rec.compare("freqs_cis_real", np.cos(phase))
  rec.compare("freqs_cis_imag", np.sin(phase))
  rec.compare("act_time_freq", sown(state, "time_freq"))
  rec.compare("act_caption_proj", sown(state, "caption_proj"))
  rec.compare("act_temb", sown(state, "temb"))
  names = {
    r"act_block(\d+)_self_attn_heads": "self_attn_heads",
    r"act_block(\d+)_cross_attn_heads": "cross_attn_heads",
    r"act_block(\d+)_out": "block_out",
  }
  for pattern, name in names.items():
    for array, layer in rec.matching(pattern):
      if layer < cfg.layers:
        rec.compare(array, sown(state, "layers", name)[layer])
  rec.compare("act_block_last_out", sown(state, "layers", "block_out")[-1])
