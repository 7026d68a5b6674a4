"""The CLIP encoder: pictures and captions that belong together attract (Radford et al. 2021, arXiv 2103.00020).

EVA-CLIP (arXiv 2303.15389) starts from masked image modelling; a miniature trained from nothing has no such start, so
three optional terms make its tokens good targets for diffusion. `moment_weight`: every channel at mean 0 and variance
1, since the release diffuses raw features. `caption_weight` and `pixel_weight`: the caption (a captioner beside the
contrast, as in CoCa, Yu et al. 2022, arXiv 2205.01917) and each token's own patch can be read from features that lie
anywhere on the way to noise, as in latent denoising tokenizers (Yang et al. 2025, arXiv 2507.15856). What a picture
shows must then survive noise, and that is what the DiT has to see; without the captions a shape lies in the faintest
directions of the features, those of an outline.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.diffusion import flow_matching
from blip3o_jax.models import flops
from blip3o_jax.models.flops import Pass

COMPONENTS = ("clip", "text_tower")


def passes(cfg, shapes, args):
  """See objectives."""
  tokens = (cfg.clip.side // cfg.clip.pool_stride) ** 2
  tower = flops.text_tower(cfg.text_tower, shapes["tokens"][1], tokens, cfg.clip.width)
  return [Pass("clip", flops.clip_encoder(cfg.clip)), Pass("text_tower", tower)]


def loss(params, batch, rng, *, model, cfg):
  """Symmetric cross entropy over the whole batch; captions that are word for word equal count as positives alike.

  `batch`: pixels [B, S, S, 3] uint8, tokens [B, L] int32, token_mask [B, L] bool.
  """
  return _loss(params, batch, rng, model=model, **cfg)


def _loss(
  params,
  batch,
  rng,
  *,
  model,
  moment_weight: float = 0.0,
  caption_weight: float = 0.0,
  pixel_weight: float = 0.0,
):
  call = lambda *args, method: model.apply({"params": params}, *args, method=method)
  tokens = batch["tokens"]
  features = call(batch["pixels"], method="clip_features")
  image, text, logit_scale = call(features, tokens, batch["token_mask"], method="contrastive_embeddings")
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

  b = tokens.shape[0]
  time_rng, noise_rng = jax.random.split(rng)
  sigma, _ = flow_matching.sample_times(time_rng, b, mode="continuous")
  noise = jax.random.normal(noise_rng, features.shape)
  noisy = flow_matching.interpolate(features, noise, sigma)
  words, patches = call(noisy, tokens, batch["token_mask"], method="read_features")
  pixel = jnp.mean(jnp.square(patches - _patches(batch["pixels"], features.shape[1])))
  entropy = -jnp.take_along_axis(jax.nn.log_softmax(words), tokens[..., None], axis=-1)[..., 0]
  caption = jnp.sum(entropy * batch["token_mask"]) / jnp.maximum(jnp.sum(batch["token_mask"]), 1)

  metrics = {"contrast": contrast, "accuracy": accuracy, "moment": moment, "local": local}
  metrics |= {"caption": caption, "pixel": pixel}
  total = contrast + moment_weight * moment + caption_weight * caption + pixel_weight * pixel
  return total * b, jnp.float32(b), {k: v * b for k, v in metrics.items()}


def _patches(pixels, count: int):
  """uint8 [B, S, S, 3] -> float32 [B, N, S * S * 3 / N] in -1..1, one row a token."""
  b, size, _, c = pixels.shape
  side = int(count**0.5)
  p = size // side
  x = pixels.astype(jnp.float32) / 127.5 - 1.0
  x = x.reshape(b, side, p, side, p, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, count, p * p * c)
