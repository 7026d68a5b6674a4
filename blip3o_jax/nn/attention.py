"""Attention: the one place where the kernel is chosen."""

import jax
import jax.numpy as jnp


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, *, scale: float | None = None
) -> jax.Array:
  """Softmax attention with grouped key-value heads.

  Args:
    q: [B, L, H, K].
    k, v: [B, S, G, K]; query head j reads key-value head j // (H / G).
    mask: bool, broadcastable to [B, 1 or H, L, S]; True = may attend. A row with nothing to attend gives the mean of v.
    scale: factor on the logits, 1 / sqrt(K) if None.

  Returns:
    [B, L, H, K] in the dtype of `v`. Logits and softmax are float32.
  """
  b, length, heads, size = q.shape
  groups = k.shape[2]
  scale = size**-0.5 if scale is None else scale
  q = q.reshape(b, length, groups, heads // groups, size)
  logits = jnp.einsum("blgrk,bsgk->bgrls", q, k, preferred_element_type=jnp.float32) * scale
  if mask is not None:
    mask = jnp.broadcast_to(mask, (mask.shape[0], mask.shape[1], length, k.shape[1]))
    if mask.shape[1] == 1:
      mask = mask[:, :, None]
    else:
      mask = mask.reshape(mask.shape[0], groups, heads // groups, length, -1)
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bgrls,bsgk->blgrk", probs, v).reshape(b, length, heads, v.shape[-1])


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
