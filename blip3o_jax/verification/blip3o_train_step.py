"""One training step: images and token ids in, loss and gradients out. Nothing is frozen in the recording."""

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.diffusion import flow_matching
from blip3o_jax.errors import UserError
from blip3o_jax.models.eva_clip import EvaClip, EvaClipConfig, pool
from blip3o_jax.models.text_decoder import text_positions
from blip3o_jax.porting.rules import blip3o
from blip3o_jax.verification import blip3o_generate
from blip3o_jax.verification.recording import Recording, load_params, nchw, nhwc, shapes


def check(rec: Recording) -> None:
  model, dit, params = blip3o_generate.load(rec)

  # Targets: pooled features of the picture.
  reader = blip3o.part(rec.weights(), "clip")
  tower = {"vision_cfg": rec.setting("eva"), "gen_pooling": rec.setting("gen_pooling")}
  clip = EvaClip(rec.build(EvaClipConfig.from_reference, tower, shapes(reader)))
  image = nhwc(rec.input("gen_image"))
  features = jax.jit(lambda p, x: clip.apply({"params": p}, x))(load_params("clip", reader, clip, image), image)
  side = clip.cfg.side // clip.cfg.pool_stride
  x1 = pool(features, clip.cfg.pool_stride).reshape(len(image), side, side, -1)
  rec.compare("target_latents", nchw(x1))

  # The prompt is what stands before the image tokens that have labels; the queries take their place.
  tokens, mask, count = rec.input("input_ids"), rec.input("attention_mask").astype(bool), model.cfg.queries
  queried = (tokens == rec.setting("image_token_id")) & (rec.input("labels") != -100)
  start = np.argmax(queried, axis=1)
  place = np.arange(tokens.shape[1])[None]
  if not (queried == ((place >= start[:, None]) & (place < start[:, None] + count))).all():
    raise UserError(f"a row of 'input_ids' does not hold one run of {count} labelled image tokens")
  rec.compare("i_s_pos", start)
  prompt, valid = jnp.asarray(tokens[:, : start.max()]), jnp.asarray(mask & (place < start[:, None]))[:, : start.max()]
  positions = jnp.broadcast_to(text_positions(valid)[:, None], (len(tokens), 3, prompt.shape[1]))

  sigma, t = flow_matching.times_at(
    jnp.asarray(rec.input("u")),
    n=int(rec.setting("scheduler", "num_train_timesteps")),
    shift=float(rec.setting("scheduler", "shift")),
  )
  rec.compare("timesteps", t)
  noise = nhwc(rec.input("noise"))
  noisy = flow_matching.interpolate(x1, noise, sigma)
  rec.compare("noisy_latents", nchw(noisy))
  keep = jnp.asarray(rec.input("cond_keep_mask")).reshape(-1, 1, 1)

  def loss(params):
    call = lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs)
    states = call(prompt, valid, positions, prefix_pass=False, method="query_states")
    velocity = call(noisy, t, states * keep, method="velocity")
    return jnp.mean(jnp.square(velocity - flow_matching.target(x1, noise))), (states, velocity)

  (value, (states, velocity)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  rec.compare("query_hidden_states", states)
  rec.compare("pred", nchw(velocity))
  rec.compare("loss", value)
  key = lambda component, name: dit.key(component, name) if component == "dit" else blip3o.full_key(component, name)
  rec.compare_gradients(grads, key, model=model.cfg)
