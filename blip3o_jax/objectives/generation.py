"""Generation: flow matching from noise to CLIP features, through the frozen backbone into queries and DiT (spec 3.2).

With the design "vae_flow" the same to the latents of the VAE (paper, 3.3): set `components` to have it in CLIP's place.

  x_sigma = (1 - sigma) x1 + sigma noise,   target v = noise - x1,   network time = 1000 sigma

The paper writes the same with t = 1 - sigma and the opposite sign (spec 14). Times are uniform, on the release's grid
{1/1000, ..., 1} (`times="discrete"`) or continuous as in the paper. `shift` > 1 trains more at high noise, where a
picture is decided when its features say everything many times over (Esser et al. 2024, arXiv 2403.03206, 5.3.2).
"""

import jax
import jax.numpy as jnp

from blip3o_jax.diffusion import flow_matching
from blip3o_jax.errors import UserError
from blip3o_jax.models import flops
from blip3o_jax.models.flops import Pass
from blip3o_jax.objectives import at_high_noise

COMPONENTS = ("backbone", "queries", "dit", "clip")


def check(args, trained) -> None:
  """The prefix pass stops gradients at the prompt, so it would train a backbone wrongly without a word."""
  if "backbone" in trained and args.get("prefix_pass", True):
    raise UserError("trainable names backbone/, whose prompt gets no gradient: set objective_args.prefix_pass to False")


def passes(cfg, shapes, args):
  """See objectives."""
  text, length, q = flops.text_of(cfg.backbone), shapes["tokens"][1], cfg.queries
  target = Pass("clip", 0.0 if "features" in shapes else flops.clip_encoder(cfg.clip), gradient=False)
  if cfg.design == "vae_flow":
    target = Pass("vae", flops.vae_encode(cfg.vae, shapes["pixels"][1]), gradient=False)
  return [
    target,
    Pass("backbone", flops.text_decoder(text, length), gradient=not args.get("prefix_pass", True)),
    Pass("backbone", flops.text_decoder(text, q, cached=length)),
    Pass("dit", flops.next_dit(cfg.dit, q)),
  ]


def loss(params, batch, rng, *, model, cfg):
  """Mean squared error of the predicted velocity.

  `batch`: tokens [B, L] ending with the image-start token (then padding), token_mask [B, L], positions [B, 3, L], and
  pixels [B, S, S, 3] uint8 or features [B, N, C]. `prefix_pass=False` is for a backbone that trains.
  """
  return _loss(params, batch, rng, model=model, **cfg)


def _loss(
  params, batch, rng, *, model, drop: float = 0.1, times: str = "discrete", shift: float = 1.0, prefix_pass: bool = True
):
  call = lambda *args, method, **kwargs: model.apply({"params": params}, *args, method=method, **kwargs)
  x1 = batch["features"] if "features" in batch else call(batch["pixels"], method="image_target")
  x1 = x1.astype(model.dtype)  # cached features may be stored in fewer bits, the draws below must not follow
  x1 = jax.lax.stop_gradient(x1)
  b, n, c = x1.shape
  side = int(n**0.5)
  x1 = x1.reshape(b, side, side, c)

  prompt = batch["tokens"], batch["token_mask"], batch["positions"]
  condition = call(*prompt, prefix_pass=prefix_pass, method="query_states")
  time_rng, noise_rng, drop_rng = jax.random.split(rng, 3)
  condition = flow_matching.drop_condition(drop_rng, condition, drop)
  sigma, t = flow_matching.sample_times(time_rng, b, mode=times, shift=shift)
  # Drawn in float32, as the sampler does: a draw in bfloat16 has 128 values, none beyond 3, and not quite mean 0.
  noise = jax.random.normal(noise_rng, x1.shape).astype(x1.dtype)
  velocity = call(flow_matching.interpolate(x1, noise, sigma), t, condition, method="velocity")

  target = flow_matching.target(x1, noise).astype(jnp.float32)
  mse = jnp.mean(jnp.square(velocity.astype(jnp.float32) - target), axis=(1, 2, 3))
  return jnp.sum(mse), jnp.float32(b), at_high_noise(mse, sigma > 0.8)
