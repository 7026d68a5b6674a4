"""One causal text decoder; Llama 3, Qwen2 (and the text side of Qwen2.5-VL) and Qwen3 are settings of it.

x = embed(tokens)
x = x + attention(rms_norm(x));  x = x + swiglu(rms_norm(x))      for every layer
hidden = rms_norm(x),  logits = hidden @ head
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from blip3o_jax.errors import UserError
from blip3o_jax.nn import rope
from blip3o_jax.nn.attention import attention
from blip3o_jax.nn.linear import Dense
from blip3o_jax.nn.mlp import SwiGLU
from blip3o_jax.nn.norms import RMSNorm
from blip3o_jax.nn.stack import scan_layers


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretching of the low rotary frequencies (transformers: rope_type "llama3")."""

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class TextDecoderConfig:
  """Sizes and flags.

  Llama 3: no flag. Qwen2: `qkv_bias`. Qwen3: `qk_norm`. Qwen2.5-VL: `qkv_bias` and `rope_sections`, the number of
  frequencies that follow the time, height and width position (they sum to head_size / 2).
  """

  vocab: int
  dim: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  mlp_dim: int
  rope_theta: float = 1e6
  rope_sections: tuple[int, int, int] | None = None
  norm_eps: float = 1e-6
  tie_embeddings: bool = False
  qkv_bias: bool = False
  out_bias: bool = False  # of the attention's last product
  mlp_bias: bool = False
  qk_norm: bool = False
  rope_scaling: RopeScaling | None = None
  remat: str = "none"

  @classmethod
  def from_reference(
    cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
  ) -> "TextDecoderConfig":
    """Our config from a reference config.json, nested (`text_config`) or flat.

    Args:
      config: the parsed config.json.
      shapes: shapes of the checkpoint's tensors, if at hand. They overrule the file: the vocabulary (the release
        shrinks it, spec 4.1), the biases, the query-key norms and whether the head is tied (spec 10.1).

    Raises:
      UserError: another activation, sliding windows, or an unknown stretching of the rotary frequencies.
    """
    text = {**config, **config.get("text_config", {})}
    rope_config = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    sections, scaling = rope_config.get("mrope_section"), None
    rope_type = rope_config.get("rope_type") or rope_config.get("type") or "default"
    if rope_type not in ("default", "mrope", "llama3", "dynamic"):  # dynamic: within the trained length the same
      raise UserError(f"language model config: rope_type {rope_type!r} is not supported; known are default and llama3")
    if text.get("use_sliding_window") or "sliding_attention" in (text.get("layer_types") or ()):
      raise UserError("language model config: sliding windows are not supported")
    if rope_type == "llama3":
      scaling = RopeScaling(
        factor=float(rope_config["factor"]),
        low_freq_factor=float(rope_config["low_freq_factor"]),
        high_freq_factor=float(rope_config["high_freq_factor"]),
        original_length=int(rope_config["original_max_position_embeddings"]),
      )
    if (activation := text.get("hidden_act", "silu")) != "silu":
      raise UserError(f"language model config: hidden_act {activation!r} is not supported; known is silu")
    kind = text.get("model_type", "")
    vocab, tied = text["vocab_size"], text.get("tie_word_embeddings", False)
    bias = text.get("attention_bias", not any(name in kind for name in ("llama", "qwen3")))
    out_bias, mlp_bias = text.get("attention_bias", False), text.get("mlp_bias", False)
    norm = "qwen3" in kind
    if shapes:
      shapes = {key.replace("model.language_model.", "model.", 1): shape for key, shape in shapes.items()}
      vocab, tied = shapes["model.embed_tokens.weight"][0], tied or "lm_head.weight" not in shapes
      bias = "model.layers.0.self_attn.q_proj.bias" in shapes
      out_bias = "model.layers.0.self_attn.o_proj.bias" in shapes
      mlp_bias = "model.layers.0.mlp.up_proj.bias" in shapes
      norm = "model.layers.0.self_attn.q_norm.weight" in shapes
    return cls(
      vocab=vocab,
      dim=text["hidden_size"],
      layers=text["num_hidden_layers"],
      heads=text["num_attention_heads"],
      kv_heads=text["num_key_value_heads"],
      head_size=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
      mlp_dim=text["intermediate_size"],
      rope_theta=float(rope_config.get("rope_theta") or text["rope_theta"]),
      rope_sections=tuple(sections) if sections else None,
      norm_eps=text["rms_norm_eps"],
      tie_embeddings=tied,
      qkv_bias=bias,
      out_bias=out_bias,
      mlp_bias=mlp_bias,
      qk_norm=norm,
      rope_scaling=scaling,
    )

  def to_reference(self) -> dict[str, Any]:
    """config.json of transformers, flat; the model's kind follows from the flags."""
    kind = "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias and not self.out_bias else "llama"
    scaling = {"mrope_section": list(self.rope_sections), "type": "mrope"} if self.rope_sections else None
    if (s := self.rope_scaling) is not None:
      scaling = {"rope_type": "llama3", "factor": s.factor, "original_max_position_embeddings": s.original_length}
      scaling |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    return {
      "architectures": [f"{kind.capitalize()}ForCausalLM"],
      "model_type": kind,
      "vocab_size": self.vocab,
      "hidden_size": self.dim,
      "num_hidden_layers": self.layers,
      "num_attention_heads": self.heads,
      "num_key_value_heads": self.kv_heads,
      "head_dim": self.head_size,
      "intermediate_size": self.mlp_dim,
      "hidden_act": "silu",
      "rms_norm_eps": self.norm_eps,
      "rope_theta": self.rope_theta,
      "rope_scaling": scaling,
      "max_position_embeddings": 128000,
      "tie_word_embeddings": self.tie_embeddings,
      "attention_bias": self.out_bias,
      "mlp_bias": self.mlp_bias,
      "use_cache": True,
    }


@struct.dataclass
class KVCache:
  """Keys and values of the tokens already read.

  Attributes:
    k, v: [layers, B, S, G, K], rotated keys.
    mask: bool [B, S], True where a real token lies.
    index: the first free slot, an int where tracing knows it (no masked slots are computed then), else an int32 scalar.
      Writing past slot S is the caller's mistake: it lands on the last slots.
  """

  k: jax.Array
  v: jax.Array
  mask: jax.Array
  index: int | jax.Array

  @classmethod
  def empty(cls, cfg: TextDecoderConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> "KVCache":
    shape = (cfg.layers, batch, slots, cfg.kv_heads, cfg.head_size)
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), bool), 0)

  def grow(self, slots: int) -> "KVCache":
    """The same cache with `slots` more free slots."""
    pad = lambda x, axis: jnp.pad(x, [(0, slots if i == axis else 0) for i in range(x.ndim)])
    return KVCache(pad(self.k, 2), pad(self.v, 2), pad(self.mask, 1), self.index)


@struct.dataclass
class TextOutput:
  """hidden: [B, L, D] after the final norm; cache: with the L new tokens written, None if none was given."""

  hidden: jax.Array
  cache: KVCache | None = None


def rope_channels(cfg: TextDecoderConfig) -> tuple[np.ndarray, np.ndarray]:
  """(axis of channel, frequency of channel), each [K / 2]; see nn.rope.phases."""
  half = cfg.head_size // 2
  frequency = cfg.rope_theta ** (-np.arange(half) / half)
  if (s := cfg.rope_scaling) is not None:
    # Wavelengths above original / low are stretched by `factor`, those below original / high kept, linear in between.
    turns = s.original_length * frequency / (2 * math.pi)
    keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    frequency = frequency * (keep + (1 - keep) / s.factor)
  axis = np.zeros(half, int) if cfg.rope_sections is None else np.repeat(np.arange(3), cfg.rope_sections)
  return axis, frequency


def text_positions(mask: jax.Array) -> jax.Array:
  """Plain positions, each row counting its own tokens: bool [B, L] -> int32 [B, L] (0 at padding before the first)."""
  return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


class Attention(nn.Module):
  """Causal grouped-query attention with rotary positions and an optional key-value cache."""

  cfg: TextDecoderConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, cached, phase, seen, slot):
    """x [B, L, D], cached None or (k, v) [B, S, G, K] -> ([B, L, D], new (k, v) [B, L, G, K]).

    Without a slot the cached tokens are those just before x, and `seen` are segments (see nn.attention); with one, x
    goes into the slots from there on, and `seen` is a mask.
    """
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def project(name, heads, axis):
      y = Dense(heads * cfg.head_size, ("embed", axis), use_bias=cfg.qkv_bias, name=name, **kinds)(x)
      return y.reshape(*x.shape[:2], heads, cfg.head_size)

    q, k = project("q", cfg.heads, "heads"), project("k", cfg.kv_heads, "kv_heads")
    v = project("v", cfg.kv_heads, "kv_heads")
    if cfg.qk_norm:
      q = RMSNorm(cfg.norm_eps, name="q_norm", **kinds)(q)
      k = RMSNorm(cfg.norm_eps, name="k_norm", **kinds)(k)
    q, k = rope.rotate_halves(q, phase), rope.rotate_halves(k, phase)
    keys, values = k, v
    if slot is not None:
      keys, values = (jax.lax.dynamic_update_slice_in_dim(c, n, slot, 1) for c, n in zip(cached, (k, v), strict=True))
    elif cached is not None:
      keys, values = (jnp.concatenate([c, n], axis=1) for c, n in zip(cached, (k, v), strict=True))
    seen = {"causal": True, "segments": seen} if slot is None else {"mask": seen}
    y = attention(q, keys, values, **seen).reshape(*x.shape[:2], -1)
    return Dense(cfg.dim, ("heads", "embed"), use_bias=cfg.out_bias, name="o", **kinds)(y), (k, v)


class Block(nn.Module):
  """One pre-norm decoder block: attention, then a gated MLP, each with a residual."""

  cfg: TextDecoderConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, cached, phase, seen, slot):
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    y = RMSNorm(cfg.norm_eps, name="input_norm", **kinds)(x)
    y, new = Attention(cfg, name="attention", **kinds)(y, cached, phase, seen, slot)
    x = x + y
    y = RMSNorm(cfg.norm_eps, name="post_norm", **kinds)(x)
    x = x + SwiGLU(cfg.mlp_dim, cfg.mlp_bias, name="mlp", **kinds)(y)
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    self.sow("intermediates", "block_out", x)
    # Without a cache nobody reads the new keys and values: do not stack them.
    return x, None if cached is None else new


class TextDecoder(nn.Module):
  """See the module docstring. Sows `layers/block_out`, [layers, B, L, D]."""

  image_keys = ()  # what `embed` takes beside the tokens; see Qwen25VL

  cfg: TextDecoderConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    cfg, kinds = self.cfg, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    init = nn.initializers.normal(0.02)
    part = nn.with_logical_partitioning
    self.embedding = self.param("embedding", part(init, ("vocab", "embed")), (cfg.vocab, cfg.dim), self.param_dtype)
    if not cfg.tie_embeddings:
      self.head = self.param("head", part(init, ("embed", "vocab")), (cfg.dim, cfg.vocab), self.param_dtype)
    broadcast = (nn.broadcast,) * 3
    self.layers = scan_layers(Block, cfg.layers, remat=cfg.remat, in_axes=(0, *broadcast))(cfg, **kinds)
    self.norm = RMSNorm(cfg.norm_eps, **kinds)

  def __call__(
    self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array, cache: KVCache | None = None
  ) -> TextOutput:
    """Read L tokens, after those of `cache` if there is one.

    A token sees itself and the valid tokens before it, in order of slots; positions only turn the phases. So prompts
    may be padded on either side, and each row gives what it gives alone. Outputs at padding mean nothing.

    Args:
      embeddings: [B, L, D].
      positions: int [B, 3, L] (time, height, width), or [B, L] for the same on every axis. Without `rope_sections` the
        first axis counts.
      mask: bool [B, L], True on real tokens.
      cache: from `empty_cache` or an earlier call, with L free slots or more.
    """
    length = embeddings.shape[1]
    axis, frequency = rope_channels(self.cfg)
    if positions.ndim == 2:
      positions = jnp.broadcast_to(positions[:, None], (positions.shape[0], 3, length))
    phase = rope.phases(jnp.swapaxes(positions, 1, 2), axis, frequency)
    index = 0 if cache is None else cache.index
    valid = mask if cache is None else jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, index, 1)
    if isinstance(index, int):  # exactly the tokens so far, in words that an attention kernel understands
      cached = None if cache is None else (cache.k[:, :, :index], cache.v[:, :, :index])
      seen, slot = (mask, valid[:, : index + length]), None
    else:
      cached, slot = (cache.k, cache.v), index
      seen = jnp.arange(valid.shape[1]) <= index + jnp.arange(length)[:, None]
      seen = (seen & valid[:, None])[:, None]
    x, new = self.layers(embeddings.astype(self.dtype), cached, phase, seen, slot)
    if cache is not None:
      write = lambda old, rows: jax.lax.dynamic_update_slice_in_dim(old, rows, index, 2)
      cache = KVCache(write(cache.k, new[0]), write(cache.v, new[1]), valid, index + length)
    return TextOutput(self.norm(x), cache)

  def decode(self, embeddings, positions, mask, cache=None) -> TextOutput:
    """The same as calling the module; the name that every language model here shares."""
    return self(embeddings, positions, mask, cache)

  def embed(self, tokens: jax.Array) -> jax.Array:
    """tokens int [B, L] -> [B, L, D]."""
    # Every chip looks up its own columns for the tokens of all that have the others, and then they are exchanged: told
    # nothing, the partitioner gathers the whole table on each (1 GiB for Qwen2.5-VL-7B).
    tokens = nn.with_logical_constraint(tokens, ("looked_up", "length"))
    columns = jnp.take(self.embedding.astype(self.dtype), tokens, axis=0)
    columns = nn.with_logical_constraint(columns, ("looked_up", "length", "embed"))
    return nn.with_logical_constraint(columns, ("batch", "length", "act_embed"))

  def logits(self, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> float32 [..., V]."""
    head = self.embedding.T if self.cfg.tie_embeddings else self.head
    return jnp.dot(hidden.astype(self.dtype), head.astype(self.dtype), preferred_element_type=jnp.float32)

  def empty_cache(self, batch: int, slots: int) -> KVCache:
    return KVCache.empty(self.cfg, batch, slots, self.dtype)

  def touch(self) -> jax.Array:
    """The smallest call that reaches every parameter, for `init`."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return self.logits(self(self.embed(tokens), tokens, tokens == 0).hidden)
