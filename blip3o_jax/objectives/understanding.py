"""Understanding: cross entropy on the answers of a conversation about pictures. The paper freezes what it trains."""

import jax
import jax.numpy as jnp

from blip3o_jax.models import flops
from blip3o_jax.models.flops import Pass

COMPONENTS = ("backbone",)


def passes(cfg, shapes, args):
  """See objectives."""
  text, length = flops.text_of(cfg.backbone), shapes["tokens"][1]
  return [
    Pass("backbone", flops.text_decoder(text, length) + flops.text_logits(text, length)),
    Pass("backbone", flops.vision(cfg.backbone, shapes)),
  ]


def loss(params, batch, rng, *, model, cfg):
  """Next-token cross entropy over `labels` != -100, summed; the weight is the number of such tokens.

  `batch`: tokens, token_mask, labels [B, L], positions [B, 3, L], and the backbone's `image_keys`.
  """
  del rng, cfg
  logits = model.apply({"params": params}, batch, method="understand")  # [B, L, V]
  labels = batch["labels"][:, 1:]
  logits = logits[:, :-1].astype(jnp.float32)
  valid = labels != -100
  safe = jnp.where(valid, labels, 0)
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), safe[..., None], axis=-1)[..., 0]
  hit = (jnp.argmax(logits, axis=-1) == labels) & valid
  weight = jnp.sum(valid).astype(jnp.float32)
  return -jnp.sum(jnp.where(valid, log_probs, 0.0)), weight, {"token_accuracy": jnp.sum(hit).astype(jnp.float32)}
