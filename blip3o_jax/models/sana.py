"""Sana, the linear diffusion transformer, with the connector through which it reads image features instead of a text
encoder's (diffusers' SanaTransformer2DModel; spec part 7.1; Xie et al. 2024, arXiv 2410.10629)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.errors import UserError
from blip3o_jax.nn.attention import attention, linear_attention
from blip3o_jax.nn.embeddings import timestep_features
from blip3o_jax.nn.linear import Conv, Dense
from blip3o_jax.nn.mlp import GLUMBConv, gelu
from blip3o_jax.nn.norms import LayerNorm, RMSNorm
from blip3o_jax.nn.stack import scan_layers

TIME_FEATURES = 256
ACTIVATION = ("batch", "length", "act_embed")


@dataclasses.dataclass(frozen=True)
class SanaConfig:
  """The transformer and its connector; the defaults are those of the 1.6 B release.

  Attributes:
    heads, head_size: of the linear self attention; the model is heads * head_size wide.
    cross_heads, cross_head_size: of the softmax attention to the condition.
    condition_dim: width of what the transformer reads, the connector's output.
    source_dim: width of the features that the connector reads; None = no connector, as in the text-to-image release.
    qk_norm: RMS norms over all heads of queries and keys (SANA-1.5).
    attention_bias: biases on the self attention's queries, keys and values.
    norm_affine: a learned gain and bias on the norm before the feed-forward layer.
  """

  in_channels: int = 32
  out_channels: int = 32
  layers: int = 20
  heads: int = 70
  head_size: int = 32
  cross_heads: int = 20
  cross_head_size: int = 112
  mlp_dim: int = 5600
  condition_dim: int = 2304
  source_dim: int | None = 1152
  patch_size: int = 1
  norm_eps: float = 1e-6
  connector_eps: float = 1e-5
  qk_norm: bool = False
  attention_bias: bool = False
  norm_affine: bool = False
  remat: str = "none"

  @property
  def dim(self) -> int:
    return self.heads * self.head_size

  @property
  def context_dim(self) -> int:
    """Width of the features that it is given."""
    return self.source_dim or self.condition_dim

  @classmethod
  def from_reference(
    cls,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    connector: Mapping[str, Any] | None = None,
  ) -> "SanaConfig":
    """From the transformer's config.json and the shapes of the weights, which say whether there is a connector.

    `connector`: what is written of it, {"act", "rmsnorm_eps"}; the release writes nothing.

    Raises:
      UserError: something that no released size of Sana has.
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    plain = {
      "interpolation_scale": (None,),  # fixed positions: the 2K and 4K models
      "guidance_embeds": (False,),  # the distilled models
      "timestep_scale": (1.0,),
      "qk_norm": (None, "rms_norm_across_heads"),
      "cross_attention_dim": (dim,),
    }
    wrong = [f"{key}={config[key]!r}" for key, values in plain.items() if config.get(key, values[0]) not in values]
    connector = {"act": "gelu_tanh", "rmsnorm_eps": 1e-5} | dict(connector or {})
    if connector["act"] != "gelu_tanh":
      wrong.append(f"connector act={connector['act']!r}")
    sources = [shape[1] for key, shape in (shapes or {}).items() if key.endswith("connector.0.weight")]
    if wrong:
      raise UserError(f"Sana config.json: not supported: {', '.join(wrong)}")
    return cls(
      in_channels=config["in_channels"],
      out_channels=config.get("out_channels") or config["in_channels"],
      layers=config["num_layers"],
      heads=config["num_attention_heads"],
      head_size=config["attention_head_dim"],
      cross_heads=config["num_cross_attention_heads"],
      cross_head_size=config["cross_attention_head_dim"],
      mlp_dim=int(config.get("mlp_ratio", 2.5) * dim),
      condition_dim=config["caption_channels"],
      source_dim=sources[0] if sources else None,
      patch_size=config.get("patch_size", 1),
      norm_eps=config.get("norm_eps", 1e-6),
      connector_eps=connector["rmsnorm_eps"],
      qk_norm=config.get("qk_norm") is not None,
      attention_bias=config.get("attention_bias", False),
      norm_affine=config.get("norm_elementwise_affine", False),
    )


class Projected(NamedTuple):
  """All that the network takes from its condition, the same at every step of a sampler: the keys and values of the
  cross attention, both [layers, B, L, H, K]."""

  keys: jax.Array
  values: jax.Array


class Connector(nn.Module):
  """Image features [B, L, S] -> condition tokens [B, L, E]: linear, GELU (tanh), linear, RMS norm (spec 7.1)."""

  cfg: SanaConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = gelu(Dense(cfg.condition_dim, ("embed", "mlp"), name="fc1", **kinds)(x), approximate=True)
    x = Dense(cfg.condition_dim, ("mlp", "embed"), name="fc2", **kinds)(x)
    # The release starts the gain so that the condition is as large as the text encoder's was.
    return RMSNorm(cfg.connector_eps, scale_init=nn.initializers.constant(5.5**0.5), name="norm", **kinds)(x)


def _modulation(module: nn.Module, rows: int) -> jax.Array:
  """A table [rows, D] that is added to what the time gives (adaLN-single, PixArt)."""
  cfg = module.cfg
  init = nn.with_logical_partitioning(nn.initializers.normal(cfg.dim**-0.5), (None, "norm"))
  return module.param("modulation", init, (rows, cfg.dim), module.param_dtype).astype(module.dtype)


class Block(nn.Module):
  """Linear self attention, cross attention, gated convolution; time modulates the first and the last."""

  cfg: SanaConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, vector, y, context):
    """x [B, h, w, D], vector [B, 6 D] of the time -> (x, None).

    The condition comes as tokens y [B, L, D], or as cross attention's own (keys, values) in `context`. With x None only
    those are computed: (None, (keys, values)), each [B, L, H, K].
    """
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def project(z, name, heads, size, use_bias):
      z = Dense(heads * size, ("embed", "heads"), use_bias, name=name, **kinds)(z)
      if cfg.qk_norm and name[-1] != "v":
        z = RMSNorm(1e-5, name=f"{name}_norm", **kinds)(z)  # over all heads at once
      return z.reshape(*z.shape[:2], heads, size)

    own = lambda z, name: project(z, f"self_{name}", cfg.heads, cfg.head_size, cfg.attention_bias)
    cross = lambda z, name: project(z, f"cross_{name}", cfg.cross_heads, cfg.cross_head_size, True)
    merge = lambda z, name: Dense(cfg.dim, ("heads", "embed"), name=name, **kinds)(z.reshape(*z.shape[:2], -1))

    if context is None:
      context = cross(y, "k"), cross(y, "v")
    if x is None:
      return None, context

    image = x.shape
    vector = _modulation(self, 6) + vector.reshape(-1, 6, cfg.dim)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(vector, 6, axis=1)

    x = nn.with_logical_constraint(x.reshape(image[0], -1, cfg.dim), ACTIVATION)
    n = LayerNorm(cfg.norm_eps, affine=False, name="norm1", **kinds)(x) * (1 + scale) + shift
    x = x + gate * merge(linear_attention(own(n, "q"), own(n, "k"), own(n, "v")), "self_out")
    x = x + merge(attention(cross(x, "q"), *context), "cross_out")  # no norm before this one
    n = LayerNorm(cfg.norm_eps, affine=cfg.norm_affine, name="norm2", **kinds)(x) * (1 + mlp_scale) + mlp_shift
    n = GLUMBConv(cfg.mlp_dim, name="mlp", **kinds)(n.reshape(image)).reshape(x.shape)
    x = nn.with_logical_constraint(x + mlp_gate * n, ACTIVATION)
    self.sow("intermediates", "block_out", x)
    return x.reshape(image), None


class Sana(nn.Module):
  """Predicts the velocity noise - data of a latent at a noise level, given image features.

  Sows `connected` [B, L, E] and, per layer, `layers/block_out` [layers, B, N, D].
  """

  cfg: SanaConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dim, p = cfg.dim, cfg.patch_size
    if cfg.source_dim:
      self.connector = Connector(cfg, **kinds)
    self.patch_embed = Conv(dim, p, p, 0, axes=("conv_in", "embed"), **kinds)
    self.caption_fc1 = Dense(dim, ("embed", "mlp"), **kinds)
    self.caption_fc2 = Dense(dim, ("mlp", "embed"), **kinds)
    self.caption_norm = RMSNorm(1e-5, **kinds)
    self.time_fc1 = Dense(dim, (None, "time"), **kinds)
    self.time_fc2 = Dense(dim, ("time", None), **kinds)
    self.time_out = Dense(6 * dim, ("time", "embed"), **kinds)
    in_axes = (nn.broadcast, nn.broadcast, 0)
    self.layers = scan_layers(Block, cfg.layers, remat=cfg.remat, in_axes=in_axes)(cfg, **kinds)
    self.modulation = _modulation(self, 2)
    self.out_norm = LayerNorm(1e-6, affine=False, **kinds)
    self.out_fc = Dense(p * p * cfg.out_channels, ("embed", None), **kinds)

  def __call__(
    self, x: jax.Array, t: jax.Array, condition: jax.Array | None, projected: Projected | None = None
  ) -> jax.Array:
    """Velocity [B, h, w, C'] in the compute dtype.

    Args:
      x: [B, h, w, C], any h and w that the patch size divides; there are no positions but the convolutions' borders.
      t: [B], noise level in 0..1000.
      condition: [B, L, S], features for the connector (without one: [B, L, E], a text encoder's states), no mask; not
        looked at where `projected` is given.
      projected: `project(condition)`, computed once for many calls. The same numbers, less work.
    """
    p = self.cfg.patch_size
    y = self._read(condition) if projected is None else None
    time = self.time_fc2(nn.silu(self.time_fc1(timestep_features(t, TIME_FEATURES))))
    x, _ = self.layers(self.patch_embed(x), self.time_out(nn.silu(time)), y, projected and tuple(projected))
    shift, scale = jnp.split((self.modulation + time[:, None])[:, :, None], 2, axis=1)
    x = self.out_fc(self.out_norm(x) * (1 + scale) + shift)
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, p, p, c // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * p, w * p, c // (p * p))

  def project(self, condition: jax.Array) -> Projected:
    """What `__call__` computes from the condition [B, L, S] alone, whatever x and t are."""
    _, keys_values = self.layers(None, None, self._read(condition), None)
    return Projected(*keys_values)

  def _read(self, condition: jax.Array) -> jax.Array:
    """Condition [B, L, S] -> its tokens for cross attention [B, L, D]."""
    if self.cfg.source_dim:
      condition = self.connector(condition)
      self.sow("intermediates", "connected", condition)
    return self.caption_norm(self.caption_fc2(gelu(self.caption_fc1(condition), approximate=True)))
