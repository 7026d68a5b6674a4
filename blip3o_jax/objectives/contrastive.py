"""The CLIP encoder: pictures and captions that belong together attract (Radford et al. 2021, arXiv 2103.00020).

EVA-CLIP (arXiv 2303.15389) starts from masked image modelling; a miniature trained from nothing has no such start, so
two optional terms keep its tokens good targets for diffusion: `moment_weight` (every channel at mean 0 and variance 1,
since the release diffuses raw features) and `pixel_weight` (a linear read-out of each token gives back its own patch).
"""

import jax
import jax.numpy as jnp

COMPONENTS = ("clip", "text_tower")


def loss(params, batch, rng, *, model, cfg):
  """Symmetric cross entropy over the whole batch; captions that are word for word equal count as positives alike.

  `batch`: pixels [B, S, S, 3] uint8, tokens [B, L] int32, token_mask [B, L] bool.
  """
  del rng
  return _loss(params, batch, model=model, **cfg)


def _loss(params, batch, *, model, moment_weight: float = 0.0, pixel_weight: float = 0.0):
  tokens = batch["tokens"]
  features = model.apply({"params": params}, batch["pixels"], method="clip_features")
  image, text, logit_scale, patches = model.apply(
    {"params": params}, features, tokens, batch["token_mask"], method="contrastive_embeddings"
  )
  logits = logit_scale * image @ text.T  # [B, B]
  same = jnp.all(tokens[:, None] == tokens[None], axis=-1).astype(jnp.float32)
  target = same / same.sum(axis=-1, keepdims=True)
  cross_entropy = lambda x: -jnp.sum(target * jax.nn.log_softmax(x, axis=-1), axis=-1)
  contrast = jnp.mean(cross_entropy(logits) + cross_entropy(logits.T)) / 2
  accuracy = jnp.mean(jnp.take_along_axis(same, jnp.argmax(logits, axis=-1)[:, None], axis=-1))

  features = features.astype(jnp.float32)
  mean = jnp.mean(features, axis=(0, 1))
  var = jnp.mean(jnp.square(features), axis=(0, 1)) - jnp.square(mean)
  moment = jnp.mean(jnp.square(mean) + jnp.square(jnp.sqrt(var + 1e-6) - 1.0))
  # Share of the variance that tells the tokens of one picture apart.
  local = jnp.mean(jnp.var(features, axis=1)) / jnp.mean(jnp.var(features, axis=(0, 1)))
  pixel = jnp.mean(jnp.square(patches - _patches(batch["pixels"], features.shape[1])))

  b = tokens.shape[0]
  metrics = {"contrast": contrast, "accuracy": accuracy, "moment": moment, "local": local, "pixel": pixel}
  total = contrast + moment_weight * moment + pixel_weight * pixel
  return total * b, jnp.float32(b), {k: v * b for k, v in metrics.items()}


def _patches(pixels, count: int):
  """uint8 [B, S, S, 3] -> float32 [B, N, S * S * 3 / N] in -1..1, one row a token."""
  b, size, _, c = pixels.shape
  side = int(count**0.5)
  p = size // side
  x = pixels.astype(jnp.float32) / 127.5 - 1.0
  x = x.reshape(b, side, p, side, p, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, count, p * p * c)
