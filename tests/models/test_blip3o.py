"""The whole model: parts wired to each other, the query pass, and fresh parameters by component."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from helpers import relative_error
from PIL import Image

from blip3o_jax.models.blip3o import BACKBONES, CLIP_MEAN, CLIP_STD, COMPONENTS, MODULES, Blip3o
from blip3o_jax.models.eva_clip import EvaClip
from blip3o_jax.models.siglip import Siglip
from blip3o_jax.models.unet import UNet
from blip3o_jax.porting import source


def call(method, backbone="qwen2_5_vl", **kwargs):
  """A method of the tiny model, compiled: f(params, *args)."""
  model = tiny.model(**tiny.BACKBONES[backbone])
  return jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method, **kwargs))


# ---- the query pass


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def backbone(request):
  return request.param


@pytest.fixture(scope="module")
def passes(backbone):
  """(value, gradients of queries, DiT and backbone) of one loss through both ways of the query pass."""
  model, params = tiny.model(**tiny.BACKBONES[backbone]), tiny.params(0, backbone)
  parts = {name: params[name] for name in ("backbone", "queries", "dit")}
  noise = np.random.default_rng(0).normal(size=(3, 2, 2, 16)).astype(np.float32)

  def loss(params, tokens, mask, positions, prefix_pass):
    run = lambda *args, method, **kwargs: model.apply({"params": params}, *args, method=method, **kwargs)
    states = run(tokens, mask, positions, method="query_states", prefix_pass=prefix_pass)
    velocity = run(noise, jnp.asarray([900.0, 500.0, 10.0]), states, method="velocity")
    return jnp.mean(jnp.square(velocity)), states

  run = tiny.quick_jit(jax.value_and_grad(loss, has_aux=True), static_argnums=4)
  return lambda prompt, prefix_pass: run(parts, *prompt, prefix_pass)


LENGTHS = [2, 6, 4]


def worst(ours, reference):
  """The largest relative error of a leaf. Leaves without any gradient but rounding (a bias on the keys of the cross
  attention moves nothing) are measured by the largest leaf."""
  largest = max(np.abs(g).max() for g in jax.tree.leaves(reference))
  error = lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest)
  return max(jax.tree.leaves(jax.tree.map(error, ours, reference)))


@pytest.mark.parametrize("side", ["right", "left", "after a picture"])
def test_prefix_pass_is_exact(passes, backbone, side):
  """Values, and gradients of queries and DiT, as if the prompt were differentiated too; none reaches the prompt."""
  tokens, mask, positions = tiny.prompts(LENGTHS, pad_to=7, side="left" if side == "left" else "right")
  if side == "after a picture":  # time, height and width part for two tokens
    positions = positions + np.where(np.arange(7) < 2, np.arange(3)[:, None], 2)
  prompt = tokens, mask, positions
  (value, states), grads = passes(prompt, True)
  (value_whole, states_whole), grads_whole = passes(prompt, False)
  assert relative_error(value, value_whole) < 1e-5 and relative_error(states, states_whole) < 1e-5
  for name in ("queries", "dit"):
    assert worst(grads[name], grads_whole[name]) < 5e-5, name  # rounding: leaves a thousand times apart in size
    error = optax.tree.norm(jax.tree.map(jnp.subtract, grads[name], grads_whole[name]))
    assert error < 1e-5 * optax.tree.norm(grads_whole[name]), name
  decoder = (lambda g: g["backbone"]) if backbone == "llama" else (lambda g: g["backbone"]["text"])
  embedding = lambda g: np.abs(decoder(g)["embedding"]).max()
  assert embedding(grads_whole) > 0 and embedding(grads) == 0


def test_query_states_are_those_of_the_plain_sequence(passes, backbone):
  """[prompt; queries] without padding, positions 0, 1, 2, ...: whichever side a batch is padded on (spec 4.2, 4.3)."""
  params, cfg = tiny.params(0, backbone), tiny.config(**tiny.BACKBONES[backbone]).backbone
  model = BACKBONES[type(cfg)](cfg)
  queries = params["queries"]["latent_queries"]

  @jax.jit
  def plain(params, tokens):
    run = lambda *args, method: model.apply({"params": params}, *args, method=method)
    x = jnp.concatenate([run(tokens[None], method="embed"), queries[None]], axis=1)
    positions = jnp.arange(x.shape[1])[None]
    return run(x, positions, jnp.ones_like(positions, bool), method="decode").hidden[0, -len(queries) :]

  (_, right), _ = passes(tiny.prompts(LENGTHS, pad_to=7), True)
  (_, left), _ = passes(tiny.prompts(LENGTHS, pad_to=7, side="left"), True)
  tokens, _, _ = tiny.prompts(LENGTHS, pad_to=7)
  want = plain(params["backbone"], tokens[1, :6])
  assert relative_error(right[1], want) < 1e-5 and relative_error(left, right) < 1e-5


# ---- wiring


def test_clip_features_normalise_and_pool_by_rows():
  model, params = tiny.model(), tiny.params()
  pixels = tiny.pixels(2)
  x = (pixels / 255 - np.asarray(CLIP_MEAN)) / np.asarray(CLIP_STD)
  tower = EvaClip(model.cfg.clip)
  run = jax.jit(lambda p, x: tower.apply({"params": p}, x))
  tokens = np.asarray(run(params["clip"], jnp.asarray(np.concatenate([x, 0 * x[:1]]), jnp.float32)))
  grid = tokens.reshape(3, 4, 4, -1)
  want = np.stack([grid[:, i : i + 2, j : j + 2].mean(axis=(1, 2)) for i in (0, 2) for j in (0, 2)], axis=1)
  clip = {"clip": params["clip"]}
  assert relative_error(call("clip_features")(clip, pixels), want[:2]) < 1e-5
  # All zeros after normalisation, which is no black picture (spec 6.5).
  assert relative_error(call("null_clip_features")(clip), want[2:]) < 1e-5


def test_unet_gets_the_mean_token_and_the_size_of_the_picture():
  """Spec 6.2; the sizes are [h, w, 0, 0, h, w], and the pooled vector belongs to its own row."""
  model, params = tiny.model(), tiny.params()
  rng = np.random.default_rng(0)
  latents, context = rng.normal(size=(2, 4, 4, 4)).astype("f"), rng.normal(size=(2, 4, 16)).astype("f")
  t = jnp.asarray([981.0, 1.0])
  unet = UNet(model.cfg.unet)
  run = jax.jit(lambda p, *args: unet.apply({"params": p}, *args))
  want = run(params["unet"], latents, t, context, context.mean(axis=1), np.tile([16.0, 16, 0, 0, 16, 16], (2, 1)))
  assert relative_error(call("unet_predict")({"unet": params["unet"]}, latents, t, context), want) < 1e-5


def test_understanding_reads_pictures_and_causally(backbone):
  """Logits of a token follow from its picture, if the backbone sees any, and from what stands before it."""
  params, run = {"backbone": tiny.params(0, backbone)["backbone"]}, call("understand", backbone)
  tokens, mask, positions = tiny.prompts([6], pad_to=6)
  tokens[0, 1] = getattr(tiny.config(**tiny.BACKBONES[backbone]).backbone, "image_token", 0)
  rng = np.random.default_rng(0)
  picture = {
    "qwen2_5_vl": {
      "patches": rng.normal(size=(1, 4, 384)).astype("f"),
      "patch_pos": np.array([[[0, 0], [0, 1], [1, 0], [1, 1]]]),
      "patch_image": np.zeros((1, 4), int),
      "patch_window": np.zeros((1, 4), int),
    },
    "qwen3_siglip": {"images": rng.integers(0, 200, (1, 1, 8, 8, 3), dtype=np.uint8)},
    "llama": {},
  }[backbone]
  batch = {"tokens": tokens, "token_mask": mask, "positions": positions} | picture
  logits = np.asarray(run(params, batch))
  assert logits.shape == (1, 6, 640) and logits.dtype == np.float32
  other = {key: x + x.dtype.type(1) if key in ("patches", "images") else x for key, x in picture.items()}
  changed = np.abs(np.asarray(run(params, batch | other)) - logits).max(axis=-1)[0] > 1e-4
  assert changed.tolist() == [False] + [bool(picture)] * 5
  later = tokens.copy()
  later[0, 4] += 1
  changed = np.abs(np.asarray(run(params, batch | {"tokens": later})) - logits).max(axis=-1)[0] > 1e-4
  assert changed.tolist() == [False, False, False, False, True, True]


# ---- what is drawn


def test_pictures_of_another_size_are_resized_as_a_library_does():
  pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
  small = np.stack([np.asarray(Image.fromarray(x).resize((16, 16), Image.Resampling.BICUBIC)) for x in pixels])
  params = {"clip": tiny.params()["clip"]}
  assert relative_error(call("clip_features")(params, pixels), call("clip_features")(params, small)) < 5e-3


def test_siglip_features_are_pooled_before_the_last_layer():
  """Spec 7.1; and no picture is a black one."""
  model, params = tiny.model(**tiny.VARIANTS["sana"]), {"clip": tiny.params(0, "sana")["clip"]}
  run = lambda *args, method: np.asarray(model.apply({"params": params}, *args, method=method))
  pixels = tiny.pixels(2)
  tower = Siglip(model.cfg.clip).apply({"params": params["clip"]}, pixels / np.float32(127.5) - 1)
  want = np.asarray(tower.penultimate).reshape(2, 2, 2, 2, 2, 16).mean(axis=(2, 4)).reshape(2, 4, 16)
  assert relative_error(run(pixels, method="clip_features"), want) < 1e-5
  black = run(np.zeros((1, 16, 16, 3), np.uint8), method="clip_features")
  np.testing.assert_allclose(run(method="null_clip_features"), black, atol=1e-6)


@pytest.mark.parametrize("variant", ["qwen2_5_vl", "sana"])
def test_latents_are_shifted_scaled_means_and_come_back_as_pictures(variant):
  changes = {} if variant == "sana" else {"vae": tiny.OVERRIDES["vae"] | {"scaling_factor": 0.5, "shift": 0.25}}
  model = tiny.model(**tiny.VARIANTS[variant] | changes)
  params, pixels = {"vae": tiny.params(0, variant)["vae"]}, tiny.pixels(2)
  vae = MODULES[type(model.cfg.vae)](model.cfg.vae)
  run = lambda x, method: np.asarray(model.apply({"params": params}, x, method=method))
  part = lambda x, method: vae.apply({"params": params["vae"]}, x, method=method)
  latents, mean = run(pixels, "picture_latents"), part(pixels / np.float32(127.5) - 1, "encode")
  want = mean * 0.41407 if variant == "sana" else (mean[0] - 0.25) * 0.5
  assert relative_error(latents, want) < 1e-5
  decoded = np.asarray(part(mean if variant == "sana" else mean[0], "decode"))
  pictures = run(latents, "latent_pictures")
  assert pictures.dtype == np.uint8
  assert np.abs(pictures - np.clip(decoded / 2 + 0.5, 0, 1) * 255).max() < 0.51


def test_the_target_is_the_designs():
  pixels = tiny.pixels(2)
  for design, method in (("clip_mse", "clip_features"), ("vae_flow", "picture_latents")):
    model, params = tiny.model(**tiny.VARIANTS[design]), tiny.params(0, design)
    run = lambda method, model=model, params=params: model.apply({"params": params}, pixels, method=method)
    np.testing.assert_array_equal(run("image_target"), run(method).reshape(2, -1, run(method).shape[-1]))


# ---- fresh parameters


def test_each_component_is_made_alone():
  """Asked for by name, exactly its parameters; every leaf carries logical axis names."""
  for name in COMPONENTS:
    boxed = jax.eval_shape(lambda name=name: Blip3o(tiny.config()).init_components(jax.random.key(0), (name,)))
    assert set(boxed) == {name}
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    bare = [x for x in leaves if not isinstance(x, nn.Partitioned) and x.shape]
    assert leaves and not bare, name
  shapes = source.abstract_params(tiny.config(), ("dit", "queries"))
  assert shapes["queries"]["latent_queries"].shape == (4, 32)


def test_a_fresh_component_does_not_depend_on_which_others_are_asked_for():
  init = lambda seed, *names: nn.unbox(
    tiny.quick_jit(lambda key: tiny.model().init_components(key, names))(jax.random.key(seed))
  )
  alone, beside, other = init(0, "text_tower"), init(0, "queries", "text_tower"), init(1, "queries")
  jax.tree.map(np.testing.assert_array_equal, alone["text_tower"], beside["text_tower"])
  assert (beside["queries"]["latent_queries"] != other["queries"]["latent_queries"]).all()


def test_queries_start_as_unit_normal():
  """Spec 2.7."""
  boxed = tiny.model(queries=640).init_components(jax.random.key(0), ("queries",))
  fresh = nn.unbox(boxed)["queries"]["latent_queries"]
  assert fresh.shape == (640, 32)
  assert abs(float(fresh.mean())) < 0.03 and abs(float(fresh.std()) - 1) < 0.03
