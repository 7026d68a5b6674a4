"""The UNet of the diffusion decoder: SDXL's structure, conditioned on CLIP image tokens (diffusers'
UNet2DConditionModel; spec part 6)."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.errors import UserError
from blip3o_jax.nn.attention import attention
from blip3o_jax.nn.embeddings import grid_code, timestep_features
from blip3o_jax.nn.linear import Conv, Dense, default_init
from blip3o_jax.nn.mlp import gelu
from blip3o_jax.nn.norms import GroupNorm, LayerNorm
from blip3o_jax.nn.resnet import Downsample, ResnetBlock, Upsample
from blip3o_jax.nn.stack import rematted, scan_layers

IMAGE = ("batch", None, None, "act_embed")
TOKENS = ("batch", "length", "act_embed")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """Sizes of the UNet; the defaults are those of the release's decoder (2,525,520,644 parameters).

  One entry a level, finest first: `block_out_channels` widths, `depths` transformer layers after each residual block
  (0 = none), `heads` attention heads. `time_id_size` is the width of the sinusoid of each of the six size numbers
  (0 = no pooled vector and no size numbers).

  Not in any published checkpoint, for small decoders trained from nothing: `position_code` adds a fixed sin-cos code of
  the place in the picture to the context tokens (a square grid) and to the tokens entering each transformer;
  `tie_query_key_init` starts the cross-attention key weights as a copy of the query weights wherever the level's width
  is the context's. With both, attention is local from the first step on; with neither it takes very long to find where
  a token lies.
  """

  in_channels: int = 4
  out_channels: int = 4
  block_out_channels: tuple[int, ...] = (320, 640, 1280)
  layers_per_block: int = 2
  depths: tuple[int, ...] = (0, 2, 10)
  mid_depth: int = 10
  heads: tuple[int, ...] = (5, 10, 20)
  context_dim: int = 1792
  time_id_size: int = 256
  norm_groups: int = 32
  norm_eps: float = 1e-5
  position_code: bool = False
  tie_query_key_init: bool = False
  remat: str = "none"

  def __post_init__(self):
    levels = len(self.block_out_channels)
    if len(self.depths) != levels or len(self.heads) != levels:
      raise UserError(f"UNet: depths {self.depths} and heads {self.heads} need one entry for each of {levels} levels")
    if self.tie_query_key_init and self.context_dim not in self.block_out_channels:
      raise UserError(
        f"UNet: tie_query_key_init needs a level as wide as the context ({self.context_dim}), "
        f"widths are {self.block_out_channels}"
      )

  @classmethod
  def from_reference(cls, config: dict) -> "UNetConfig":
    """From the reference's config.json.

    Raises:
      UserError: the file asks for something that SDXL's structure does not have.
    """
    silent = {  # what an entry is where the file is silent (diffusers' defaults)
      "in_channels": 4,
      "out_channels": 4,
      "layers_per_block": 2,
      "norm_num_groups": 32,
      "norm_eps": 1e-5,
      "use_linear_projection": False,
    }
    config = silent | config
    widths = tuple(config["block_out_channels"])
    per_level = lambda v: tuple(v) if isinstance(v, list | tuple) else (v,) * len(widths)
    layers = per_level(config.get("transformer_layers_per_block", 1))
    crossed = tuple(kind.startswith("CrossAttn") for kind in config["down_block_types"])
    plain = {
      "class_embed_type": None,
      "encoder_hid_dim_type": None,
      "reverse_transformer_layers_per_block": None,
      "time_cond_proj_dim": None,
      "only_cross_attention": False,
      "dual_cross_attention": False,
      "center_input_sample": False,
      "use_linear_projection": True,
      "flip_sin_to_cos": True,
      "freq_shift": 0,
      "resnet_time_scale_shift": "default",
      "act_fn": "silu",
      "mid_block_type": "UNetMidBlock2DCrossAttn",
      # These leave no mark on names and shapes.
      "mid_block_scale_factor": 1,
      "mid_block_only_cross_attention": None,
      "downsample_padding": 1,
      "resnet_skip_time_act": False,
      "resnet_out_scale_factor": 1.0,
      "time_embedding_type": "positional",
      "time_embedding_act_fn": None,
      "timestep_post_act": None,
    }
    # Files say null, false or 0 alike where something is off.
    wrong = [f"{k}={config[k]!r}" for k, v in plain.items() if k in config and (config[k] or None) != (v or None)]
    for side, order in (("Down", crossed), ("Up", crossed[::-1])):
      wanted = [f"{'CrossAttn' if c else ''}{side}Block2D" for c in order]
      if list(config[f"{side.lower()}_block_types"]) != wanted:
        wrong.append(f"{side.lower()}_block_types={config[f'{side.lower()}_block_types']!r} (not {wanted!r})")
    if config.get("addition_embed_type") not in (None, "text_time"):
      wrong.append(f"addition_embed_type={config['addition_embed_type']!r}")
    if wrong:
      raise UserError(f"UNet config.json: not supported: {', '.join(wrong)}; SDXL's structure is expected")
    return cls(
      in_channels=config["in_channels"],
      out_channels=config["out_channels"],
      block_out_channels=widths,
      layers_per_block=config["layers_per_block"],
      depths=tuple(n if c else 0 for n, c in zip(layers, crossed, strict=True)),
      mid_depth=layers[-1],
      # diffusers' `attention_head_dim` is the number of heads: an old misnomer kept for the sake of its checkpoints.
      heads=per_level(config.get("num_attention_heads") or config["attention_head_dim"]),
      context_dim=config["cross_attention_dim"],
      time_id_size=config["addition_time_embed_dim"] if config.get("addition_embed_type") else 0,
      norm_groups=config["norm_num_groups"],
      norm_eps=config["norm_eps"],
      position_code=config.get("position_code", False),  # our own word, see to_reference
    )

  def to_reference(self, sample_size: int) -> dict[str, Any]:
    """config.json of diffusers' UNet2DConditionModel; `sample_size` is the side of the latents. diffusers warns of
    `position_code`, which it does not have, where it is set.

    Raises:
      UserError: the middle is not as deep as the last level.
    """
    if not self.mid_depth or self.depths[-1] not in (0, self.mid_depth):
      raise UserError(
        f"UNet: diffusers takes the depth of the middle from the last level, and here they are {self.mid_depth} and "
        f"{self.depths[-1]}; only a model directory can hold it"
      )
    kinds = ["CrossAttn" if depth else "" for depth in self.depths]
    content = {
      "sample_size": sample_size,
      "in_channels": self.in_channels,
      "out_channels": self.out_channels,
      "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
      "mid_block_type": "UNetMidBlock2DCrossAttn",
      "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
      "block_out_channels": list(self.block_out_channels),
      "layers_per_block": self.layers_per_block,
      # A level without attention has no depth; diffusers wants a number there. The last is the middle's too.
      "transformer_layers_per_block": [*(max(depth, 1) for depth in self.depths[:-1]), self.mid_depth],
      "attention_head_dim": list(self.heads),  # the number of heads, an old misnomer
      "use_linear_projection": True,
      "cross_attention_dim": self.context_dim,
      "norm_num_groups": self.norm_groups,
      "norm_eps": self.norm_eps,
      "act_fn": "silu",
      "flip_sin_to_cos": True,
      "freq_shift": 0,
    }
    if self.time_id_size:
      content |= {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": self.time_id_size,
        "projection_class_embeddings_input_dim": self.context_dim + 6 * self.time_id_size,
      }
    return content | ({"position_code": True} if self.position_code else {})


class Attention(nn.Module):
  """Multi-head attention from x [B, L, D] to source [B, S, E], no bias except on the output: -> [B, L, D].

  `keys_values` ([B, S, H, K] twice) replaces the source where it is already projected.
  """

  heads: int
  tie_query_key_init: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, source: jax.Array | None, keys_values: Any = None) -> jax.Array:
    dim, types = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
    init = default_init
    if self.tie_query_key_init and self.is_initializing() and source.shape[-1] == dim:
      key = self.make_rng("params")
      init = lambda _, shape, dtype: default_init(key, shape, dtype)  # one key: the same numbers for q and k

    def project(y, name, kernel_init):
      y = Dense(dim, ("embed", "heads"), use_bias=False, kernel_init=kernel_init, **types, name=name)(y)
      return y.reshape(*y.shape[:2], self.heads, dim // self.heads)

    q = project(x, "q", init)
    k, v = keys_values or (project(source, "k", init), project(source, "v", default_init))
    y = attention(q, k, v)
    return Dense(dim, ("heads", "embed"), **types, name="out")(y.reshape(x.shape))


class TransformerLayer(nn.Module):
  """Self-attention, cross-attention and GEGLU feed-forward, each x + f(norm(x)): [B, L, D] -> ([B, L, D], None)."""

  cfg: UNetConfig
  heads: int
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, keys_values: Any, context: jax.Array | None) -> tuple[jax.Array, None]:
    dim, types = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
    norm = lambda name: LayerNorm(1e-5, **types, name=name)(x)
    attend = lambda name, tie: Attention(self.heads, tie, **types, name=name)
    y = norm("norm1")
    x = x + attend("self_attention", False)(y, y)
    x = x + attend("cross_attention", self.cfg.tie_query_key_init)(norm("norm2"), context, keys_values)
    y, gate = jnp.split(Dense(8 * dim, ("embed", "mlp"), **types, name="mlp_in")(norm("norm3")), 2, axis=-1)
    x = x + Dense(dim, ("mlp", "embed"), **types, name="mlp_out")(y * gelu(gate))
    return nn.with_logical_constraint(x, TOKENS), None


class Transformer(nn.Module):
  """`depth` layers over the places of a feature map, + shortcut: [B, h, w, D] -> [B, h, w, D]."""

  cfg: UNetConfig
  depth: int
  heads: int
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None, keys_values: Any = None) -> jax.Array:
    cfg, types = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    b, h, w, dim = x.shape
    dense = lambda name: Dense(dim, ("embed", None), **types, name=name)
    y = dense("proj_in")(GroupNorm(cfg.norm_groups, 1e-6, **types, name="norm")(x).reshape(b, h * w, dim))
    if cfg.position_code:
      y = y + jnp.asarray(grid_code(h, w, dim), y.dtype)
    layers = scan_layers(TransformerLayer, self.depth, remat=cfg.remat, in_axes=(0, nn.broadcast))
    y, _ = layers(cfg, self.heads, **types, name="layers")(y, keys_values, context)
    return x + dense("proj_out")(y).reshape(x.shape)


class UNet(nn.Module):
  """Predicts the noise (or v) in latents, conditioned on time, context tokens, their mean and six size numbers."""

  cfg: UNetConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    latents: jax.Array,
    t: jax.Array,
    context: jax.Array | None,
    pooled: jax.Array | None = None,
    time_ids: jax.Array | None = None,
    *,
    projected: dict[str, Any] | None = None,
  ) -> jax.Array:
    """One prediction.

    Args:
      latents: [B, h, w, in_channels]. Odd sizes are halved upwards, and doubled to the size that they came from.
      t: time in 0..1000, [B] or a scalar.
      context: [B, N, E]; ignored (may be None) where `projected` is given.
      pooled: [B, E'], the mean of the context tokens in the release. Unused if cfg.time_id_size is 0.
      time_ids: [B, 6], (original height, width, crop top, left, target height, width).
      projected: the result of `project(context)`, computed once where the context is constant over many calls.

    Returns:
      [B, h, w, out_channels] in `dtype`.
    """
    cfg, types = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    levels = len(cfg.block_out_channels)
    if projected is None:
      context = self._with_code(context)

    resnet_block = rematted(ResnetBlock, cfg.remat)

    def conv(features, name):
      return Conv(features, **types, name=name)

    def resnet(x, features, name):
      block = resnet_block(features, cfg.norm_groups, cfg.norm_eps, **types, name=name)
      return nn.with_logical_constraint(block(x, time), IMAGE)

    def transformer(x, depth, heads, name):
      if not depth:
        return x
      return Transformer(cfg, depth, heads, **types, name=name)(x, context, projected and projected[name])

    time = self._embed_time(latents.shape[0], t, pooled, time_ids)
    x = conv(cfg.block_out_channels[0], "conv_in")(latents)
    skips = [x]
    for i, features in enumerate(cfg.block_out_channels):
      for j in range(cfg.layers_per_block):
        x = resnet(x, features, f"down_{i}_resnet_{j}")
        x = transformer(x, cfg.depths[i], cfg.heads[i], f"down_{i}_attention_{j}")
        skips.append(x)
      if i < levels - 1:
        x = Downsample(1, **types, name=f"down_{i}_downsample")(x)
        skips.append(x)

    x = resnet(x, cfg.block_out_channels[-1], "mid_resnet_0")
    x = transformer(x, cfg.mid_depth, cfg.heads[-1], "mid_attention_0")
    x = resnet(x, cfg.block_out_channels[-1], "mid_resnet_1")

    for i, features in enumerate(cfg.block_out_channels[::-1]):
      for j in range(cfg.layers_per_block + 1):
        x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), features, f"up_{i}_resnet_{j}")
        x = transformer(x, cfg.depths[::-1][i], cfg.heads[::-1][i], f"up_{i}_attention_{j}")
      if i < levels - 1:
        x = Upsample(skips[-1].shape[1:3], **types, name=f"up_{i}_upsample")(x)

    x = nn.silu(GroupNorm(cfg.norm_groups, cfg.norm_eps, **types, name="norm_out")(x))
    return conv(cfg.out_channels, "conv_out")(x)

  def project(self, context: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-attention keys and values of every layer: context [B, N, E] -> {transformer: two [depth, B, N, H, K]}.

    They do not depend on time or latents, so a sampler computes them once and passes them as `projected`.
    """
    cfg, context = self.cfg, self._with_code(context).astype(self.dtype)
    heads = {f"down_{i}": n for i, n in enumerate(cfg.heads)} | {f"up_{i}": n for i, n in enumerate(cfg.heads[::-1])}
    heads["mid"] = cfg.heads[-1]

    def keys_values(name, kernels):
      n = heads[name.split("_attention_")[0]]
      y = [jnp.einsum("bne,led->lbnd", context, kernels[x]["kernel"].astype(self.dtype)) for x in "kv"]
      return tuple(a.reshape(*a.shape[:-1], n, a.shape[-1] // n) for a in y)

    params = self.variables["params"]
    return {k: keys_values(k, p["layers"]["cross_attention"]) for k, p in params.items() if "_attention_" in k}

  def _with_code(self, context):
    if not self.cfg.position_code:
      return context
    side = math.isqrt(context.shape[1])
    if side * side != context.shape[1]:
      raise UserError(f"UNet: position_code needs a square grid of context tokens, got {context.shape[1]} tokens")
    return context + jnp.asarray(grid_code(side, side, context.shape[2]), context.dtype)

  def _embed_time(self, batch, t, pooled, time_ids):
    cfg, types = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    width = 4 * cfg.block_out_channels[0]

    def mlp(x, name):
      x = nn.silu(Dense(width, ("embed", "mlp"), **types, name=f"{name}_1")(x))
      return Dense(width, ("mlp", "time"), **types, name=f"{name}_2")(x)

    t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), (batch,))
    time = mlp(timestep_features(t, cfg.block_out_channels[0]), "time_embedding")
    if cfg.time_id_size:
      sizes = timestep_features(time_ids, cfg.time_id_size).reshape(batch, -1)
      time = time + mlp(jnp.concatenate([pooled.astype(jnp.float32), sizes], axis=-1), "add_embedding")
    return time
