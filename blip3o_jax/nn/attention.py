"""Attention: the one place where the kernel is chosen.

Kernels never write the [L, S] logits to memory: Pallas' splash attention on a TPU, cuDNN's on a GPU in 16 bits. They
are for sequences no shorter than a block of theirs; all else is plain XLA, of very long sequences some rows at a time.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from blip3o_jax.nn.target import target_platform

Segments = tuple[jax.Array, jax.Array]  # int [B, L] of the queries and [B, S] of the keys

LANES = 128  # the kernel's unit of length
_BLOCK = 512  # logits are computed in tiles of at most this many queries by keys
_LONG = 1 << 24  # queries times keys from which on XLA takes only some rows at a time,
_LOGITS = 1 << 28  # so many that all examples and heads have no more logits than these: 1 GiB


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None = None,
  *,
  causal: bool = False,
  segments: Segments | None = None,
  scale: float | None = None,
) -> jax.Array:
  """Softmax attention with grouped key-value heads.

  A kernel cannot take any `mask`: say what may attend by `causal` and `segments` wherever these can say it.

  Args:
    q: [B, L, H, K].
    k, v: [B, S, G, K]; query head j reads key-value head j // (H / G).
    mask: bool, broadcastable to [B, 1 or H, L, S]; True = may attend. A row with nothing to attend gives the mean of v.
    causal: the queries are the last L of the S places, and see none after their own.
    segments: numbers of queries and keys; a query sees the keys of its own number.
    scale: factor on the logits, 1 / sqrt(K) if None.

  Returns:
    [B, L, H, K] in the dtype of `v`. Logits and softmax are float32.
  """
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if mask is None and min(q.shape[1], k.shape[1]) >= LANES:
    platform, settings = target_platform(), {"causal": causal, "scale": scale}
    if platform == "tpu":
      return _on_mesh(functools.partial(splash_attention, **settings), q, k, v, segments)
    if platform == "gpu" and cudnn_agrees(q.shape[1:], k.shape[1:], str(q.dtype), causal, segments is not None):
      return _on_mesh(functools.partial(cudnn_attention, **settings), q, k, v, segments)
  if q.shape[1] * k.shape[1] > _LONG:
    return _some_rows_at_a_time(q, k, v, mask, causal, segments, scale)
  return plain_attention(q, k, v, dense_mask(q, k, mask, causal, segments), scale=scale)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, *, scale: float) -> jax.Array:
  """`attention` in XLA, with a dense mask."""
  b, length, heads, size = q.shape
  slots, groups = k.shape[1:3]
  ratio = heads // groups
  # The query heads of a group stand one after another along the length, so that no product has to turn the logits over:
  # on a CPU that takes as long as the products themselves.
  q = q.reshape(b, length, groups, ratio, size).transpose(0, 3, 1, 2, 4).reshape(b, ratio * length, groups, size)
  logits = jnp.einsum("bmgk,bsgk->bgms", q, k, preferred_element_type=jnp.float32) * scale
  if mask is not None:
    mask = jnp.broadcast_to(mask, (mask.shape[0], mask.shape[1], length, slots))
    if mask.shape[1] == 1:
      mask = mask[:, :, None]
    else:
      mask = mask.reshape(mask.shape[0], groups, ratio, length, slots)
    logits = jnp.where(mask, logits.reshape(b, groups, ratio, length, slots), jnp.finfo(jnp.float32).min)
  probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(b, groups, ratio * length, slots)
  out = jnp.einsum("bgms,bsgk->bmgk", probs, v).reshape(b, ratio, length, groups, -1)
  return out.transpose(0, 2, 3, 1, 4).reshape(b, length, heads, -1)


def _some_rows_at_a_time(q, k, v, mask, causal: bool, segments: Segments | None, scale: float) -> jax.Array:
  """`plain_attention` of some queries after others, computed again for the gradient, so that the logits of all never
  exist at once (Rabe and Staats 2021, arXiv 2112.05682)."""
  b, length, heads, _ = q.shape
  slots = k.shape[1]
  blocks = -(-length * b * heads * slots // _LOGITS)
  rows = -(-length // blocks)

  def of_queries(change):
    """What has a row for every query, changed along that axis, and the rest as it is."""
    seen = change(mask, 2) if mask is not None and mask.shape[2] > 1 else mask
    return change(q, 1), seen, segments and (change(segments[0], 1), segments[1])

  pad = lambda x, axis: jnp.pad(x, [(0, blocks * rows - length if i == axis else 0) for i in range(x.ndim)])
  q, mask, segments = of_queries(pad)

  @jax.checkpoint
  def some(first):
    part, seen, numbers = of_queries(lambda x, axis: jax.lax.dynamic_slice_in_dim(x, first, rows, axis))
    seen = dense_mask(part, k, seen, causal, numbers, first=slots - length + first)
    return plain_attention(part, k, v, seen, scale=scale)

  out = jax.lax.map(some, rows * jnp.arange(blocks))
  return out.swapaxes(0, 1).reshape(b, blocks * rows, heads, -1)[:, :length]


def dense_mask(q, k, mask, causal: bool, segments: Segments | None, first: int | jax.Array | None = None):
  """The bool mask [B, 1 or H, L, S] that all three ways to give one make together, or None. `first`: the place of the
  first query if they are not the last."""
  length, slots = q.shape[1], k.shape[1]
  both = lambda a, b: b if a is None else a & b
  if causal:
    places = jnp.arange(length) + (slots - length if first is None else first)
    mask = both(mask, jnp.arange(slots)[None, None, None] <= places[None, None, :, None])
  if segments is not None:
    mask = both(mask, (segments[0][:, :, None] == segments[1][:, None, :])[:, None])
  return mask


# ---- the kernels


def cudnn_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None = None, *, causal: bool = False, scale: float
) -> jax.Array:
  """`attention` by cuDNN's fused kernels, forward and backward, on the arrays of one GPU: 16 bits, K multiple of 8."""
  square = q.shape[1] == k.shape[1]
  mask = dense_mask(q, k, None, causal and not square, segments)
  settings = {"scale": scale, "is_causal": causal and square, "implementation": "cudnn"}
  return jax.nn.dot_product_attention(q, k, v, mask=mask, **settings).astype(v.dtype)


@functools.cache
def cudnn_agrees(q_shape, k_shape, dtype: str, causal: bool, segmented: bool) -> bool:
  """Whether cuDNN takes one example of these shapes [L, H, K] and [S, G, K], with its gradient, and gives what XLA
  gives. Which versions take what is written nowhere in full, so the first use of each is a trial on the GPU itself."""
  if dtype not in ("bfloat16", "float16"):
    return False
  rng = np.random.default_rng(0)
  draw = lambda shape: jnp.asarray(rng.standard_normal((1, *shape)), dtype)
  numbers = lambda n: (jnp.arange(n) >= n // 3).astype(jnp.int32)[None]
  segments = (numbers(q_shape[0]), numbers(k_shape[0])) if segmented else None
  scale = q_shape[-1] ** -0.5

  def both(function):
    value = lambda q, k, v, w: jnp.sum((function(q, k, v) * w).astype(jnp.float32))
    return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(*inputs)

  try:
    with jax.ensure_compile_time_eval():
      inputs = draw(q_shape), draw(k_shape), draw(k_shape), draw(q_shape)
      ours = both(lambda q, k, v: cudnn_attention(q, k, v, segments, causal=causal, scale=scale))
      mask = dense_mask(inputs[0], inputs[1], None, causal, segments)
      theirs = both(lambda q, k, v: plain_attention(q, k, v, mask, scale=scale))
  except Exception:  # no cuDNN, an older one, or a shape that it has no plan for
    return False
  apart = lambda a, b: np.abs(np.float32(a) - np.float32(b)).max() <= 0.05 * np.abs(np.float32(b)).max()
  return all(map(apart, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def splash_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: Segments | None = None,
  *,
  causal: bool = False,
  scale: float,
  interpret: bool = False,
) -> jax.Array:
  """`attention` as Pallas kernels, forward and backward, on the arrays of one device.

  Lengths are padded to whole lanes here; the padding is a segment of its own. `interpret` runs the kernel on a CPU,
  very slowly, to check its numbers. The scale goes into q, in its dtype: in bfloat16 one rounding more than in XLA.
  """
  b, length, heads, _ = q.shape
  slots = k.shape[1]
  pad = lambda x, fill=0: jnp.pad(x, [(0, 0), (0, -x.shape[1] % LANES)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
  if segments is None and (length % LANES or slots % LANES):
    segments = jnp.zeros((b, length), jnp.int32), jnp.zeros((b, slots), jnp.int32)
  if segments is not None:
    segments = splash.SegmentIds(*(pad(x.astype(jnp.int32), -1) for x in segments))
  heads_first = lambda x: pad(x).swapaxes(1, 2)
  q, k, v = heads_first((q * scale).astype(q.dtype)), heads_first(k), heads_first(v)
  shape = q.shape[2], k.shape[2]
  seen = splash.CausalMask(shape, offset=slots - length) if causal else splash.FullMask(shape)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([seen] * heads),
    block_sizes=_blocks(*shape),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  out = jax.vmap(kernel)(q, k, v, segments)
  return out.swapaxes(1, 2)[:, :length].astype(v.dtype)


def _blocks(length: int, slots: int) -> splash.BlockSizes:
  """The largest tiles of at most _BLOCK that divide the padded lengths."""
  largest = lambda n: max(d for d in range(LANES, _BLOCK + 1, LANES) if n % d == 0)
  rows, columns = largest(length), largest(slots)
  return splash.BlockSizes(
    block_q=rows,
    block_kv=columns,
    block_q_dkv=rows,
    block_kv_dkv=columns,
    block_q_dq=rows,
    block_kv_dq=columns,
  )


def _on_mesh(kernel, q, k, v, segments: Segments | None) -> jax.Array:
  """`kernel(q, k, v, segments)` on every device's own rows and heads: the compiler cannot cut up a kernel by itself."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(q, k, v, segments)
  ways = lambda axes: math.prod(mesh.shape[a] for a in axes)
  there = lambda axes: tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ()) if a in mesh.shape)
  rows, heads = map(there, nn.logical_to_mesh_axes(("batch", "act_heads")))
  # Whole on every device where it does not divide: correct, and only for small cases (one row, an odd number of heads).
  rows = rows if q.shape[0] % ways(rows) == 0 else ()
  heads = heads if q.shape[2] % ways(heads) == 0 == k.shape[2] % ways(heads) else ()
  x, number = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
  in_specs = (x, x, x, None if segments is None else (number, number))
  return jax.shard_map(kernel, in_specs=in_specs, out_specs=x, check_vma=False)(q, k, v, segments)


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """ReLU attention, linear in the length: out_i = sum_j (q_i . k_j) v_j / (sum_j q_i . k_j + 1e-15), q and k rectified.

  The sums over j are taken first, so no [L, S] matrix exists (Katharopoulos et al. 2020, arXiv 2006.16236; Sana and the
  DC-AE, where the reference sums the same products the other way round for very small images).

  Args:
    q: [B, L, H, K].
    k, v: [B, S, H, K].

  Returns:
    [B, L, H, K] in the dtype of `v`; all sums are float32, for they grow with S.
  """
  q, k = (jax.nn.relu(x).astype(jnp.float32) for x in (q, k))
  summed = jnp.einsum("bshk,bshv->bhkv", k, v.astype(jnp.float32))
  total = jnp.einsum("blhk,bhk->blh", q, jnp.sum(k, axis=1))
  return (jnp.einsum("blhk,bhkv->blhv", q, summed) / (total[..., None] + 1e-15)).astype(v.dtype)
