"""`blip3o bench dit|backbone|encoder|decoder|generate|chat`: the parts of the model, each by the calls that training
and inference make, with random weights.

Sizes: benchmarks.sizes, in float32; `--preset 4b|8b` takes those of the release in bfloat16, for a GPU or a TPU host.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.benchmarks import Case, compiled, nbytes, sizes, warmed
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.inference import image as drawing
from blip3o_jax.inference import text as talking
from blip3o_jax.inference.model import Model
from blip3o_jax.models import flops, presets
from blip3o_jax.models.blip3o import BACKBONES, Blip3o, Blip3oConfig
from blip3o_jax.nn.stack import written_out
from blip3o_jax.porting.locate import open_model
from blip3o_jax.sharding import rules
from blip3o_jax.sharding.mesh import make_mesh
from blip3o_jax.types import Params

PROMPT = "a red cube on a blue sphere, in front of a wall of grey stone, on an early morning in autumn"


@dataclasses.dataclass(frozen=True)
class Setup:
  """What is measured: the architecture, how much of it at once, and in what.

  Attributes:
    batch: examples at once. length: tokens of a prompt. new: tokens of an answer.
    pictures: batches of whole pictures. steps: of the DiT and of the UNet for one.
    devices: the batch of the DiT is cut over so many.
  """

  cfg: Blip3oConfig
  dtype: str
  batch: int
  length: int = 256
  new: int = 64
  pictures: tuple[int, ...] = (1, 8)
  steps: tuple[int, int] = (30, 50)
  devices: int = 1

  def model(self) -> Blip3o:
    """The module, which computes in `dtype`."""
    return Blip3o(self.cfg, dtype=jnp.dtype(self.dtype))

  def weights(self, *components: str) -> Params:
    """Random parameters in `dtype`."""
    return sizes.weights(self.cfg, components, self.dtype)

  def spread(self, params: Params, *rows: jax.Array) -> tuple:
    """Copies of the parameters on the devices, and rows cut over them."""
    mesh = make_mesh({"slice": 1, "data": self.devices}, devices=jax.devices()[: self.devices])
    return jax.device_put(params, rules.replicated(mesh)), *jax.device_put(rows, rules.batch_sharding(mesh))


def setup(preset: str = "", batch: int = 0) -> Setup:
  """The sizes of a preset, or those for a CPU, where a picture takes 6 + 6 steps rather than 30 + 50.

  Backward passes find everything saved on a CPU, where that is fastest; of the release's sizes, the products alone.
  """
  cfg, dtype = presets.with_remat(sizes.architecture(preset), "dots" if preset else "none"), sizes.dtype_of(preset)
  if preset:
    return Setup(cfg, dtype, batch or 8)
  return Setup(cfg, dtype, batch or 2, steps=(6, 6))


def _normal(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def dit(on: Setup) -> Iterator[Case]:
  """One velocity of the DiT, and with the gradients of all its parameters and of its condition."""
  cfg, model, batch = on.cfg, on.model(), 4 * on.batch
  x = _normal(1, batch, *cfg.dit.grid, cfg.dit.in_channels, dtype=on.dtype)
  t = jnp.linspace(1000.0, 1.0, batch)
  condition = _normal(2, batch, cfg.queries, cfg.backbone.dim, dtype=on.dtype)
  params, x, t, condition = on.spread(on.weights("dit"), x, t, condition)
  given = {"setup": on, "params": params, "inputs": (x, t, condition)}
  velocity = lambda params, x, t, condition: model.apply({"params": params}, x, t, condition, method="velocity")
  forward = batch * flops.next_dit(cfg.dit, cfg.queries)
  yield compiled(
    f"dit forward, {batch} latents",
    velocity,
    (params, x, t, condition),
    flops=forward,
    count=batch,
    unit="latents",
    given=given | {"work": "dit"},
  )

  def loss(params, condition, x, t):
    with written_out(gradient=True):  # as a training step
      return jnp.mean(jnp.square(velocity(params, x, t, condition).astype(jnp.float32)))

  gradient = jax.value_and_grad(loss, argnums=(0, 1))
  yield compiled(
    f"dit forward and backward, {batch} latents",
    gradient,
    (params, condition, x, t),
    flops=3 * forward,
    count=batch,
    unit="latents",
    given=given | {"work": "dit gradient"},
  )


def backbone(on: Setup) -> Iterator[Case]:
  """The hidden states of prompts, as they condition the DiT."""
  cfg, model = on.cfg, on.model()
  params = on.weights("backbone", "queries")
  prompt = _prompt(on)
  states = lambda params, *prompt: model.apply({"params": params}, *prompt, method="query_states")
  text = flops.text_of(cfg.backbone)
  count = flops.text_decoder(text, on.length) + flops.text_decoder(text, cfg.queries, cached=on.length)
  yield compiled(
    f"backbone, {on.batch} prompts of {on.length} and {cfg.queries} queries",
    states,
    (params, *prompt),
    flops=on.batch * count,
    count=on.batch * (on.length + cfg.queries),
    unit="tokens",
    given={"work": "backbone", "setup": on, "params": params, "inputs": prompt},
  )


def _prompt(on: Setup) -> tuple[jax.Array, jax.Array, jax.Array]:
  """tokens, mask [B, L], positions [B, 3, L] of random prompts without padding."""
  tokens = np.random.default_rng(3).integers(0, min(on.cfg.backbone.text.vocab, 600), (on.batch, on.length))
  positions = jnp.broadcast_to(jnp.arange(on.length, dtype=jnp.int32), (on.batch, 3, on.length))
  return jnp.asarray(tokens, jnp.int32), jnp.ones((on.batch, on.length), bool), positions


def encoder(on: Setup) -> Iterator[Case]:
  """Pooled CLIP features of pictures, as training and caching compute them."""
  cfg, model, size = on.cfg, on.model(), on.cfg.clip.image_size
  params = on.weights("clip")
  pixels = jnp.asarray(np.random.default_rng(4).integers(0, 256, (on.batch, size, size, 3), np.uint8))
  yield compiled(
    f"encoder, {on.batch} pictures",
    lambda params, pixels: drawing.encode_features(model, params, pixels),
    (params, pixels),
    flops=on.batch * flops.clip_encoder(cfg.clip),
    count=on.batch,
    unit="pictures",
    given={"work": "encoder", "setup": on, "params": params, "inputs": (pixels,)},
  )


def decoder(on: Setup) -> Iterator[Case]:
  """One step of the UNet as the sampler takes it, its conditions projected before, and the VAE's decoding."""
  cfg, model = on.cfg, on.model()
  side, tokens = cfg.image_size // cfg.vae.downsampling, math.prod(cfg.dit.grid)
  params = on.weights("unet")
  latents = _normal(5, on.batch, side, side, cfg.unet.in_channels, dtype=on.dtype)
  context = _normal(6, on.batch, tokens, cfg.unet.context_dim, dtype=on.dtype)
  t = jnp.full(on.batch, 501.0)
  call = lambda params, *args, method: model.apply({"params": params}, *args, method=method)
  projected = jax.jit(lambda params, context: call(params, context, method="project_context"))(params, context)
  yield compiled(
    f"decoder, UNet step, {on.batch} x {side} x {side}",
    lambda params, *args: call(params, *args, method="unet_predict"),
    (params, latents, t, context, projected),
    flops=on.batch * flops.unet(cfg.unet, side, tokens),
    count=on.batch,
    unit="latents",
    given={"work": "unet", "setup": on, "params": params, "inputs": (latents, t, context)},
  )
  del projected
  params = on.weights("vae")
  yield compiled(
    f"decoder, VAE, {on.batch} x {cfg.image_size} x {cfg.image_size} pixels",
    lambda params, latents: call(params, latents, method="vae_decode"),
    (params, latents),
    flops=on.batch * flops.vae_decode(cfg.vae, cfg.image_size),
    count=on.batch,
    unit="pictures",
    given={"work": "vae", "setup": on, "params": params, "inputs": (latents,)},
  )


def generate(on: Setup) -> Iterator[Case]:
  """Whole pictures by the public class, guidance on, from the words to the pixels."""
  cfg, (steps, decoder_steps) = on.cfg, on.steps
  params = on.weights("backbone", "queries", "dit", "unet", "vae")
  tokenizer = load_tokenizer(open_model("micro").tokenizer_dir())
  sampling = drawing.Sampling(steps=steps, decoder_steps=decoder_steps)
  model = Model(on.model(), params, tokenizer, None, sampling)
  row = model.row_to_draw(PROMPT, sampling)
  length, text = model.prompts.batch([row], draw=True).tokens.shape[1], flops.text_of(cfg.backbone)
  side = cfg.image_size // cfg.vae.downsampling
  features = flops.text_decoder(text, length) + flops.text_decoder(text, cfg.queries, cached=length)
  features += 2 * steps * flops.next_dit(cfg.dit, cfg.queries)
  pixels = 2 * decoder_steps * flops.unet(cfg.unet, side, math.prod(cfg.dit.grid))
  one = features + pixels + flops.vae_decode(cfg.vae, cfg.image_size)
  weights = {name: nbytes(params[name]) for name in params}
  layers = nbytes(params["backbone"]["text"]["layers"])
  moved = 2 * layers + steps * weights["dit"] + decoder_steps * weights["unet"] + weights["vae"]
  blank = [*tokenizer.encode(" "), tokenizer.image_start]
  for batch in on.pictures:
    keys = drawing.picture_keys(0, range(batch))
    yield warmed(
      f"generate, {batch} at once, {steps} + {decoder_steps} steps, {cfg.image_size} pixels",
      lambda batch=batch: model.generate(PROMPT, num=batch, seed=0),
      flops=batch * one,
      moved=moved,
      count=batch,
      unit="pictures",
      given={"work": "generate", "setup": on, "params": params, "inputs": (row.tokens, blank, batch, keys)},
    )


def chat(on: Setup) -> Iterator[Case]:
  """The first token after a prompt, and an answer, token by token over a key-value cache; greedy, at batch 1."""
  cfg, on = on.cfg, dataclasses.replace(on, batch=1)
  params, text = on.weights("backbone"), flops.text_of(cfg.backbone)
  module = BACKBONES[type(cfg.backbone)](cfg.backbone, dtype=jnp.dtype(on.dtype))
  tokens, mask, _ = (np.asarray(x) for x in _prompt(on))

  def answer(new):
    said = talking.generate_text(module, params["backbone"], tokens, mask, sampling=talking.Sampling(new))
    return said.tokens

  given = {"work": "chat", "setup": on, "params": params, "inputs": (tokens,)}
  prefill = flops.text_decoder(text, on.length) + flops.text_logits(text, 1)
  decoder = params["backbone"]["text"]
  read = nbytes(decoder["layers"]) + nbytes(decoder.get("head", decoder["embedding"]))  # the table of words is a row's
  yield warmed(
    f"chat, first token after {on.length}",
    lambda: answer(1),
    flops=prefill,
    moved=read,
    count=on.length,
    unit="tokens",
    given=given | {"new": 1},
  )
  each = flops.text_decoder(text, 1, cached=on.length) + flops.text_logits(text, 1)
  yield warmed(
    f"chat, an answer of {on.new} tokens after {on.length}",
    lambda: answer(on.new),
    flops=prefill + (on.new - 1) * each,
    moved=on.new * read,
    count=on.new,
    unit="tokens",
    given=given | {"new": on.new},
  )


PARTS: dict[str, Callable[[Setup], Iterator[Case]]] = {
  "dit": dit,
  "backbone": backbone,
  "encoder": encoder,
  "decoder": decoder,
  "generate": generate,
  "chat": chat,
}
