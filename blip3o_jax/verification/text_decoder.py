"""Text-only language models: padded batches and greedy decoding."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.inference.text import Sampling, generate_text
from blip3o_jax.models.text_decoder import TextDecoder, TextDecoderConfig, text_positions
from blip3o_jax.verification.recording import Recording, load_params, shapes, sown

_INPUTS = ("input_ids", "attention_mask")


def check(rec: Recording) -> None:
  reader = rec.weights()
  model = TextDecoder(rec.build(TextDecoderConfig.from_reference, rec.config, shapes(reader)))
  params = load_params("text_decoder", reader, model, method="touch")
  for prefix in groups(rec):
    mask = rec.input(f"{prefix}attention_mask").astype(bool)
    check_group(rec, prefix, model, params, model.cfg.layers, np.asarray(text_positions(jnp.asarray(mask))))


def groups(rec: Recording) -> list[str]:
  """The prefixes under which a recording holds token batches ("" if there is one without prefix). Either input shows a
  batch, so that an absent one is noticed."""
  found = [name.rpartition(":") for name in rec.names]
  return list(dict.fromkeys(f"{prefix}{colon}" for prefix, colon, name in found if name in _INPUTS))


def check_group(
  rec: Recording,
  prefix: str,
  model: Any,
  params: Any,
  layers: int,
  positions: np.ndarray,
  *,
  vision: dict[str, np.ndarray] | None = None,
  stack: tuple[str, ...] = ("layers",),
) -> None:
  """Logits, hidden states, positions and greedy tokens of one padded batch.

  Args:
    positions: int [B, L] or [B, 3, L].
    vision: patches and their numbers, where the batch holds images.
    stack: where the decoder's layers sow.
  """
  tokens, mask = rec.input(f"{prefix}input_ids"), rec.input(f"{prefix}attention_mask").astype(bool)
  if (name := f"{prefix}position_ids") in rec:
    axes_first = positions if positions.ndim == 2 else positions.swapaxes(0, 1)
    if rec.ndim(name) == 3 and axes_first.ndim == 2:
      axes_first = np.broadcast_to(axes_first, (3, *axes_first.shape))
    rec.compare(name, axes_first, valid=mask)

  vision = {k: v for k, v in (vision or {}).items() if k.startswith("patch")}

  def forward(params):
    call = lambda *args, method, **kwargs: model.apply(
      {"params": params}, *args, **kwargs, method=method, mutable=["intermediates"]
    )
    embeddings, _ = call(jnp.asarray(tokens), **vision, method="embed")
    output, state = call(embeddings, jnp.asarray(positions), jnp.asarray(mask), method="decode")
    return call(output.hidden, method="logits")[0], output.hidden, state

  logits, hidden, state = jax.jit(forward)(params)
  valid = mask[..., None]
  rec.compare(f"{prefix}logits", logits, valid=valid)
  rec.compare(f"{prefix}last_hidden_state", hidden, valid=valid)
  for name, layer in rec.matching(re.escape(prefix) + r"hidden_state_after_layer(\d+)"):
    if layer < layers:
      rec.compare(name, sown(state, *stack, "block_out")[layer], valid=valid)

  wanted = [name for name in (f"{prefix}greedy_new_tokens", f"{prefix}greedy_step_logits") if name in rec]
  if wanted:
    answer = generate_text(
      model,
      params,
      tokens,
      mask,
      positions=positions,
      vision=vision,
      sampling=Sampling(max_new_tokens=rec.length(wanted[0], 1)),  # no stop token: the recordings do not stop
      keep_logits=True,
    )
    rec.compare(f"{prefix}greedy_new_tokens", answer.tokens)
    rec.compare(f"{prefix}greedy_step_logits", answer.logits)
