"""Answers from a language model: the prompt in one pass, then token by token over a key-value cache: two programs."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import UserError
from blip3o_jax.models.text_decoder import text_positions
from blip3o_jax.nn.stack import for_loop, written_out

_MOST_TOKENS = 32768  # of an answer: the context that Qwen2.5-VL was trained with


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen, in the order of transformers: temperature, then top-k, then top-p.

  temperature 0 takes the likeliest token. top_k 0 and top_p 1 keep all. Only `max_new_tokens` makes a new program.
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  stop_tokens: tuple[int, ...] = ()
  pad_token: int = 0

  def __post_init__(self):
    if not 1 <= self.max_new_tokens <= _MOST_TOKENS:  # memory is taken for all of them
      raise UserError(f"max_new_tokens is {self.max_new_tokens}; take 1 to {_MOST_TOKENS}")
    # Not a number is in no range.
    if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise UserError(
        f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: want at least 0, at least 0, and 0..1"
      )


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a batch of prompts was answered.

  Attributes:
    tokens: int32 [B, max_new_tokens], the stop token included, `pad_token` after it.
    lengths: int32 [B], tokens of each answer without its stop token.
    logits: float32 [B, max_new_tokens, V] before temperature and filters if asked for, else None.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  logits: np.ndarray | None = None

  def rows(self) -> list[list[int]]:
    """The answers as lists, without stop token and padding."""
    return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """Drop the unlikely tokens of [..., V] to -inf: all below the k-th, then all after the mass top_p is reached."""
  size = logits.shape[-1]
  ranked = -jnp.sort(-logits, axis=-1)
  kth = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
  kept = jnp.arange(size) <= kth
  probs = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
  # The first token always stays: nothing lies before it.
  kept &= (jnp.cumsum(probs, axis=-1) - probs < top_p) | (jnp.arange(size) == 0)
  floor = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= floor, logits, -jnp.inf)


def _choose(logits, keys, step, temperature, top_k, top_p):
  """logits [B, V], keys [B] -> int32 [B]. Each row draws from its own key, so rows do not depend on each other."""

  def draw(_):
    filtered = filter_logits(logits / jnp.maximum(temperature, 1e-6), top_k, top_p)
    return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, filtered)

  greedy = lambda _: jnp.argmax(logits, axis=-1)
  return jax.lax.cond(temperature > 0, draw, greedy, None).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "new", "keep_logits"))
def _begin(model, params, tokens, mask, positions, vision, keys, settings, *, new, keep_logits):
  """The prompt pass and the first token: (tokens so far, position of the next, cache, state)."""
  call = lambda *args, method, **kwargs: model.apply({"params": params}, *args, **kwargs, method=method)
  b, length = tokens.shape

  # The prompt sees a cache of its own length; the free slots are added afterwards, so that it does not pay for them.
  embeddings = call(tokens, **vision, method="embed")
  output = call(embeddings, positions, mask, call(b, length, method="empty_cache"), method="decode")
  last = length - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
  logits = call(jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)[:, 0], method="logits")
  start = jnp.max(jnp.where(mask[:, None], positions, -1), axis=(1, 2)) + 1
  state = {
    "tokens": jnp.full((b, new), settings[1], jnp.int32),
    "lengths": jnp.zeros(b, jnp.int32),
    "done": jnp.zeros(b, bool),
  }
  if keep_logits:
    state["logits"] = jnp.zeros((b, new, logits.shape[-1]), jnp.float32)
  return jnp.int32(1), start, output.cache.grow(new - 1), _record(state, 0, logits, keys, settings)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("carry",))
def _advance(model, params, carry, keys, settings, limit):
  """Token by token until there are `limit`, or all rows have ended."""
  parts, whole = for_loop(params)

  @written_out()
  def body(carry):
    params = whole(parts)
    call = lambda *args, method: model.apply({"params": params}, *args, method=method)
    i, start, cache, state = carry
    token = jax.lax.dynamic_slice_in_dim(state["tokens"], i - 1, 1, 1)
    position = jnp.broadcast_to((start + i - 1)[:, None, None], (len(start), 3, 1))
    output = call(call(token, method="embed"), position, jnp.ones((len(start), 1), bool), cache, method="decode")
    logits = call(output.hidden[:, 0], method="logits")
    return i + 1, start, output.cache, _record(dict(state), i, logits, keys, settings)

  return jax.lax.while_loop(lambda c: (c[0] < limit) & ~jnp.all(c[3]["done"]), body, carry)


def _record(state, i, logits, keys, settings):
  stop, pad, *choice = settings
  token = jnp.where(state["done"], pad, _choose(logits, keys, i, *choice))
  state["tokens"] = state["tokens"].at[:, i].set(token)
  if "logits" in state:
    state["logits"] = state["logits"].at[:, i].set(logits)
  state["lengths"] += ~(state["done"] | jnp.isin(token, stop))
  state["done"] |= jnp.isin(token, stop)
  return state


def generate_text(*args, **kwargs) -> Answer:
  """The whole answer: the last item of `stream_text`, which says what goes in."""
  *_, answer = stream_text(*args, every=None, **kwargs)
  return answer


def stream_text(
  model: Any,
  params: Mapping[str, Any],
  tokens: np.ndarray,
  mask: np.ndarray,
  *,
  positions: np.ndarray | None = None,
  vision: Mapping[str, np.ndarray] | None = None,
  sampling: Sampling | None = None,
  keys: jax.Array | None = None,
  keep_logits: bool = False,
  every: int | None = 4,
) -> Iterator[Answer]:
  """Answer a batch of prompts, telling how far it is. Each row is answered as if it were alone, wherever its padding
  lies.

  Args:
    model: one of models.blip3o.BACKBONES.
    params: its parameters.
    tokens: int [B, L]; mask: bool [B, L], at least one True a row.
    positions: int [B, 3, L]; plain counting if None. Prompts with images take data.vision.rope_index.
    vision: the prompts' images under the model's `image_keys`, perhaps among other keys; nothing: text alone.
    keys: [B] random keys, one a row; needed for temperature > 0. Step i of a row draws from fold_in(key, i).
    every: yield the answer so far after so many more tokens; None: only at the end. The programs are the same.

  Raises:
    UserError: an empty prompt, or no keys to sample with.
  """
  sampling = sampling or Sampling()
  tokens, said = jnp.asarray(tokens, jnp.int32), np.asarray(mask, bool).any(axis=-1)
  if not said.all():
    raise UserError(f"prompt {int(np.argmin(said))} is empty: give it at least one token")
  if keys is None:
    if sampling.temperature > 0:
      raise UserError("sampling with a temperature needs `keys`, one random key a row")
    keys = jax.random.split(jax.random.key(0), tokens.shape[0])
  mask = jnp.asarray(mask, bool)
  positions = text_positions(mask) if positions is None else jnp.asarray(positions, jnp.int32)
  if positions.ndim == 2:
    positions = jnp.broadcast_to(positions[:, None], (tokens.shape[0], 3, tokens.shape[1]))
  settings = (
    jnp.asarray(sampling.stop_tokens, jnp.int32),
    jnp.int32(sampling.pad_token),
    jnp.float32(sampling.temperature),
    jnp.int32(sampling.top_k),
    jnp.float32(sampling.top_p),
  )
  vision = {key: vision[key] for key in model.image_keys} if vision else {}
  new = sampling.max_new_tokens
  prompt = (tokens, mask, positions, vision, keys, settings)
  carry = _begin(model, params, *prompt, new=new, keep_logits=keep_logits)
  for limit in [*range(1, new, every), new] if every else [new]:
    carry = _advance(model, params, carry, keys, settings, jnp.int32(limit))
    state = jax.device_get(carry[3])
    yield Answer(state["tokens"], state["lengths"], state.get("logits"))
    if state["done"].all():
      return
