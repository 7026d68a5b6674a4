"""The diffusion transformer: Next-DiT with cross attention (the release's NextDiTCrossAttn; spec part 2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import UserError
from blip3o_jax.nn import rope
from blip3o_jax.nn.attention import attention
from blip3o_jax.nn.embeddings import timestep_features
from blip3o_jax.nn.linear import Dense, torch_uniform
from blip3o_jax.nn.mlp import SwiGLU, gelu
from blip3o_jax.nn.norms import LayerNorm, RMSNorm
from blip3o_jax.nn.stack import scan_layers

TIME_FEATURES = 256
ACTIVATION = ("batch", "length", "act_embed")


@dataclasses.dataclass(frozen=True)
class NextDiTConfig:
  """The transformer (spec 2.1).

  Attributes:
    grid: (h, w) of the latent, or its side.
    condition_dim: width of the condition, the hidden size of the language model.
    qk_norm: LayerNorm on queries and keys across all heads.
    rope: "interleaved", two axes (row, column), is the release's table and what its weights need; "concatenated",
      three axes (time, row, column), is the paper's 3D one (spec 2.6).
    rope_split: channels of a head for each of the three axes; None = a quarter and twice three eighths (16 + 24 + 24).

  Raises:
    UserError: heads or the split do not divide, unknown rope.
  """

  in_channels: int
  grid: int | tuple[int, int]
  dim: int
  layers: int
  heads: int
  kv_heads: int
  ffn_dim: int
  condition_dim: int
  patch_size: int = 1
  norm_eps: float = 1e-5
  qk_norm: bool = True
  rope: str = "interleaved"
  rope_split: tuple[int, int, int] | None = None
  rope_theta: float = 10000.0
  remat: str = "none"

  def __post_init__(self):
    if isinstance(self.grid, int):
      object.__setattr__(self, "grid", (self.grid, self.grid))
    if self.dim % self.heads or self.heads % self.kv_heads:
      raise UserError(f"DiT: {self.heads} heads must divide dim {self.dim}, and {self.kv_heads} kv_heads the heads")
    if self.rope not in ("interleaved", "concatenated"):
      raise UserError(f"DiT: rope {self.rope!r} is neither 'interleaved' nor 'concatenated'")
    if self.rope == "concatenated" and (sum(self.split) != self.head_size or any(d % 2 for d in self.split)):
      raise UserError(f"DiT: rope_split {self.split} must be even numbers that add up to head size {self.head_size}")

  @property
  def head_size(self) -> int:
    return self.dim // self.heads

  @property
  def time_dim(self) -> int:
    """Width of the vector that modulates the layers."""
    return min(self.dim, 1024)

  @property
  def split(self) -> tuple[int, ...]:
    side = 3 * self.head_size // 8
    return self.rope_split or (self.head_size - 2 * side, side, side)

  @classmethod
  def from_reference(
    cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
  ) -> "NextDiTConfig":
    """From the reference's config.json and the shapes of its weights, whatever the prefix of their names.

    The feed-forward width comes from the weights: versions of the reference disagree on how to compute it (spec 2.1).
    """
    if config.get("learn_sigma"):
      raise UserError("DiT config: learn_sigma is not supported; the release predicts the velocity alone")
    dim, heads = config["dim"], config["n_heads"]
    widths = [s[0] for key, s in (shapes or {}).items() if key.endswith("layers.0.feed_forward.linear_1.weight")]
    if not widths:
      width = int(int(8 * dim / 3) * (config.get("ffn_dim_multiplier") or 1.0))
      multiple = config.get("multiple_of", 256)
      widths = [-(-width // multiple) * multiple]
    return cls(
      in_channels=config["in_channels"],
      grid=config["input_size"],
      patch_size=config.get("patch_size", 1),
      dim=dim,
      layers=config["n_layers"],
      heads=heads,
      kv_heads=config.get("n_kv_heads") or heads,
      ffn_dim=widths[0],
      condition_dim=config["latent_embedding_size"],
      norm_eps=config.get("norm_eps", 1e-5),
      qk_norm=config.get("qk_norm", True),
    )

  @classmethod
  def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "NextDiTConfig":
    """From the weights alone (spec 10.2), which is all that the release has: patch size 1 and the two-axis table."""
    layer = lambda name: shapes[f"model.layers.0.{name}"]
    (heads,), (dim, _) = layer("gate"), layer("attn1.to_q.weight")
    return cls(
      in_channels=shapes["model.patch_embedder.proj.weight"][1],
      grid=(8, 8),
      dim=dim,
      layers=1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("model.layers.")),
      heads=heads,
      kv_heads=layer("attn1.to_k.weight")[0] * heads // dim,
      ffn_dim=layer("feed_forward.linear_1.weight")[0],
      condition_dim=shapes["model.caption_projection.linear_1.weight"][1],
      qk_norm="model.layers.0.attn1.norm_q.weight" in shapes,
    )


def rope_phases(cfg: NextDiTConfig, height: int, width: int) -> jax.Array:
  """Phases of a grid of tokens, row-major: float32 [height * width, K / 2]. A picture is at time 0 (spec 2.5, 2.6)."""
  row, col = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
  if cfg.rope == "interleaved":
    axes, channels = (row, col), rope.interleaved_channels(2, cfg.head_size, cfg.rope_theta)
  else:
    axes, channels = (0 * row, row, col), rope.concatenated_channels(cfg.split, cfg.rope_theta)
  return rope.phases(jnp.asarray(np.stack(axes, axis=-1).reshape(height * width, -1)), *channels)


def _linear(fan_in: int, features: int, axes: tuple[str | None, str | None], use_bias: bool = True, **kinds) -> Dense:
  """A layer that starts as torch's does: weights and biases uniform in +-1/sqrt(fan_in) (spec 2.7)."""
  bound = fan_in**-0.5
  bias_init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
  return Dense(features, axes, use_bias, kernel_init=torch_uniform(), bias_init=bias_init, **kinds)


class Projected(NamedTuple):
  """All that the network takes from its condition, the same at every step of a sampler.

  pooled [B, T]: its part of the modulating vector; keys, values [layers, B, L, G, K] of the cross attention.
  """

  pooled: jax.Array
  keys: jax.Array
  values: jax.Array


class Block(nn.Module):
  """Self and cross attention side by side, then a feed-forward layer, both between two norms (spec 2.3, 2.4)."""

  cfg: NextDiTConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, modulation, phase, y, context):
    """x [B, N, D], modulation [B, T] after silu, phase [1, N, K / 2] -> (x, None).

    The condition comes as projected tokens y [B, L, D], or as cross attention's own (keys, values) in `context`. With
    x None only those are computed: (None, (keys, values)), each [B, L, G, K].
    """
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    rms = lambda name: RMSNorm(cfg.norm_eps, name=name, **kinds)

    def project(z, name, heads, axis):
      z = _linear(cfg.dim, heads * cfg.head_size, ("embed", axis), False, name=name, **kinds)(z)
      # Across all heads at once, with mean and bias: not the usual norm of each head.
      if cfg.qk_norm and name[-1] != "v":
        z = LayerNorm(1e-5, name=f"{name}_norm", **kinds)(z)
      return z.reshape(*z.shape[:2], heads, cfg.head_size)

    queries = lambda z, name: rope.rotate_pairs(project(z, f"{name}_q", cfg.heads, "heads"), phase)
    keys = lambda z, name: project(z, f"{name}_k", cfg.kv_heads, "kv_heads")
    values = lambda z, name: project(z, f"{name}_v", cfg.kv_heads, "kv_heads")

    if context is None:
      y = rms("context_norm")(y)
      context = keys(y, "cross"), values(y, "cross")
    if x is None:
      return None, context

    x = nn.with_logical_constraint(x, ACTIVATION)
    mod = _linear(cfg.time_dim, 4 * cfg.dim, ("time", "embed"), name="modulation", **kinds)(modulation)
    attn_scale, attn_gate, mlp_scale, mlp_gate = jnp.split(mod[:, None], 4, axis=-1)

    n = rms("norm1")(x) * (1 + attn_scale)
    heads = attention(queries(n, "self"), rope.rotate_pairs(keys(n, "self"), phase), values(n, "self"))
    # Keys of the condition carry no position; the queries are those of the same modulated norm.
    cross = attention(queries(n, "cross"), *context)
    self.sow("intermediates", "self_attn_heads", heads)
    self.sow("intermediates", "cross_attn_heads", cross)
    gate = self.param(
      "gate", nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,)), (cfg.heads,), self.param_dtype
    )
    heads = heads + jnp.tanh(gate.astype(self.dtype))[:, None] * cross
    out = _linear(cfg.dim, cfg.dim, ("heads", "embed"), False, name="out", **kinds)(heads.reshape(x.shape))
    x = x + jnp.tanh(attn_gate) * rms("norm2")(out)

    mlp = SwiGLU(cfg.ffn_dim, kernel_init=torch_uniform(), name="mlp", **kinds)
    out = mlp(rms("ffn_norm1")(x) * (1 + mlp_scale))
    x = nn.with_logical_constraint(x + jnp.tanh(mlp_gate) * rms("ffn_norm2")(out), ACTIVATION)
    self.sow("intermediates", "block_out", x)
    return x, None


class NextDiT(nn.Module):
  """Predicts the velocity noise - data of a latent at a noise level, given condition tokens.

  Sows `phase`, `time_freq`, `caption_proj`, `temb` and, per layer, `layers/self_attn_heads`, `layers/cross_attn_heads`
  [layers, B, N, H, K] and `layers/block_out` [layers, B, N, D].
  """

  cfg: NextDiTConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dim, time, patch = cfg.dim, cfg.time_dim, cfg.patch_size**2 * cfg.in_channels
    self.patch_embed = _linear(patch, dim, (None, "embed"), **kinds)
    self.condition_fc1 = _linear(cfg.condition_dim, dim, ("embed", "mlp"), **kinds)
    self.condition_fc2 = _linear(dim, dim, ("mlp", "embed"), **kinds)
    self.time_fc1 = _linear(TIME_FEATURES, time, (None, "time"), **kinds)
    self.time_fc2 = _linear(time, time, ("time", None), **kinds)
    self.pooled_norm = LayerNorm(1e-5, **kinds)
    self.pooled_fc = _linear(dim, time, ("embed", "time"), **kinds)
    in_axes = (nn.broadcast, nn.broadcast, nn.broadcast, 0)
    self.layers = scan_layers(Block, cfg.layers, remat=cfg.remat, in_axes=in_axes)(cfg, **kinds)
    self.out_norm = LayerNorm(1e-6, affine=False, **kinds)
    self.out_scale = _linear(time, dim, ("time", "embed"), **kinds)
    self.out_fc = _linear(dim, patch, ("embed", None), **kinds)

  def __call__(
    self, x: jax.Array, t: jax.Array, condition: jax.Array | None, projected: Projected | None = None
  ) -> jax.Array:
    """Velocity [B, h, w, C] in the compute dtype.

    Args:
      x: [B, h, w, C], any h and w that the patch size divides.
      t: [B], noise level in 0..1000; kept in float32 until its sinusoids are taken.
      condition: [B, L, E], no mask; not looked at where `projected` is given.
      projected: `project(condition)`, computed once for many calls. The same numbers, less work.
    """
    cfg, p = self.cfg, self.cfg.patch_size
    b, height, width, c = x.shape
    h, w = height // p, width // p
    if projected is None:
      y, pooled = self._read(condition)
      context = None
    else:
      y, (pooled, *context) = None, projected

    freq = timestep_features(t, TIME_FEATURES)
    vector = self.time_fc2(nn.silu(self.time_fc1(freq))) + pooled
    phase = rope_phases(cfg, h, w)
    self.sow("intermediates", "time_freq", freq)
    self.sow("intermediates", "temb", vector)
    self.sow("intermediates", "phase", phase)
    vector = nn.silu(vector)

    # Patches are flattened (channel, row, column) on the way in, (row, column, channel) on the way out.
    x = x.reshape(b, h, p, w, p, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, h * w, c * p * p)
    x = nn.with_logical_constraint(self.patch_embed(x), ACTIVATION)
    x, _ = self.layers(x, vector, phase[None], y, context)
    x = self.out_fc(self.out_norm(x) * (1 + self.out_scale(vector)[:, None]))
    return x.reshape(b, h, w, p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, c)

  def project(self, condition: jax.Array) -> Projected:
    """What `__call__` computes from the condition [B, L, E] alone, whatever x and t are."""
    y, pooled = self._read(condition)
    _, (keys, values) = self.layers(None, None, None, y, None)
    return Projected(pooled, keys, values)

  def _read(self, condition: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Condition [B, L, E] -> its tokens for cross attention [B, L, D] and its part of the modulating vector [B, T]."""
    y = self.condition_fc2(gelu(self.condition_fc1(condition), approximate=True))
    y = nn.with_logical_constraint(y, ACTIVATION)
    self.sow("intermediates", "caption_proj", y)
    mean = jnp.mean(y.astype(jnp.float32), axis=1).astype(y.dtype)
    return y, self.pooled_fc(self.pooled_norm(mean))
