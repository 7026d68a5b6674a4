"""The text decoder against recordings of Llama, Llama with scaled rope, and Qwen3, and its cache against itself."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, relative_error

from blip3o_jax.errors import UserError
from blip3o_jax.models.text_decoder import KVCache, TextDecoder, TextDecoderConfig, text_positions
from blip3o_jax.porting.convert import to_ours, to_reference
from blip3o_jax.porting.rules.text_decoder import RULES

TINY = TextDecoderConfig(
  vocab=31,
  dim=32,
  layers=3,
  heads=4,
  kv_heads=2,
  head_size=12,
  mlp_dim=40,
  rope_theta=100.0,
  rope_sections=(1, 2, 3),
  qkv_bias=True,
)


@functools.cache
def load(name):
  recording = load_golden(name)
  cfg = TextDecoderConfig.from_reference(recording.config, {k: v.shape for k, v in recording.weights.items()})
  model = TextDecoder(cfg)
  abstract = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), method="touch")["params"]))
  return model, to_ours(RULES, recording.weights, abstract), recording


@functools.cache
def tiny():
  """A model with noise on every leaf (biases start at zero and would hide mistakes) and three ragged rows."""
  model = TextDecoder(TINY)

  @jax.jit
  def noisy():
    leaves, tree = jax.tree.flatten(nn.unbox(model.init(jax.random.key(0), method="touch"))["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])

  params = noisy()
  x = jax.random.normal(jax.random.key(2), (3, 7, TINY.dim))
  mask = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], bool)
  positions = np.asarray(text_positions(mask))[:, None] + np.array([0, 3, 1])[:, None]
  return model, params, x, mask, positions


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "mutable"))
def run(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "llama_rope_scaled", "qwen3"])
def test_recording(name, side):
  model, params, recording = load(name)
  io = {key.removeprefix(f"{side}:"): value for key, value in recording.io.items() if key.startswith(side)}
  mask = io["attention_mask"] > 0
  np.testing.assert_array_equal(text_positions(mask)[mask], io["position_ids"][mask])
  x = run(model, params, io["input_ids"], method="embed")
  output, state = run(model, params, x, io["position_ids"], mask, mutable="intermediates")
  layer0 = state["intermediates"]["layers"]["block_out"][0][0]
  logits = run(model, params, output.hidden, method="logits")
  assert relative_error(layer0[mask], io["hidden_state_after_layer0"][mask]) < 1e-4
  assert relative_error(output.hidden[mask], io["last_hidden_state"][mask]) < 1e-4
  assert relative_error(logits[mask], io["logits"][mask]) < 1e-4


@pytest.mark.parametrize("name", ["llama", "llama_rope_scaled", "qwen3", "qwen2_5_vl", "qwen2_5_vl_tied"])
def test_flat_config_says_the_same(name):
  recording = load_golden(name)
  flat = json.loads((recording.path / "config_flat.json").read_text())
  cfg = TextDecoderConfig.from_reference(recording.config)
  assert TextDecoderConfig.from_reference(flat) == cfg
  shapes = {key: value.shape for key, value in recording.weights.items()}
  assert TextDecoderConfig.from_reference(flat, shapes) == cfg
  shapes["model.embed_tokens.weight"] = (7, cfg.dim)
  renamed = {key.replace("model.", "model.language_model.", 1): value for key, value in shapes.items()}
  assert TextDecoderConfig.from_reference(flat, renamed).vocab == 7


@pytest.mark.parametrize("name", ["llama", "llama_rope_scaled", "qwen3"])
def test_weights_round_trip(name):
  _, params, recording = load(name)
  back = dict(to_reference(RULES, params))
  assert back.keys() == recording.weights.keys()
  for key, value in recording.weights.items():
    np.testing.assert_array_equal(back[key], value)


def test_biases_that_a_checkpoint_has():
  """Llama's attention_bias and mlp_bias: all seven products of a layer have one, and each bears on the result."""
  recording = load_golden("llama")
  added = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
  added += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
  weights, layers = dict(recording.weights), recording.config.get("text_config", recording.config)["num_hidden_layers"]
  for i in range(layers):
    for name in added:
      weights[f"model.layers.{i}.{name}.bias"] = 0.1 * np.ones(
        len(weights[f"model.layers.{i}.{name}.weight"]), np.float32
      )
  cfg = TextDecoderConfig.from_reference(recording.config, {k: v.shape for k, v in weights.items()})
  assert cfg.qkv_bias and cfg.out_bias and cfg.mlp_bias
  assert cfg.to_reference()["model_type"] == "llama" and cfg.to_reference()["attention_bias"]
  model = TextDecoder(cfg)
  abstract = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), method="touch")["params"]))
  params = to_ours(RULES, weights, abstract)
  assert dict(to_reference(RULES, params)).keys() == weights.keys()
  tokens = recording.io["right:input_ids"]
  mask, positions = np.ones(tokens.shape, bool), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  hidden = lambda params: run(model, params, run(model, params, tokens, method="embed"), positions, mask).hidden
  plain = hidden(params)
  for path in (("attention", "o"), ("mlp", "gate"), ("mlp", "up"), ("mlp", "down")):
    without = jax.tree.map(lambda x: x, params)
    without["layers"][path[0]][path[1]]["bias"] = np.zeros_like(params["layers"][path[0]][path[1]]["bias"])
    assert relative_error(hidden(without), plain) > 1e-3


@pytest.mark.parametrize(
  "change, words",
  [
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}, "rope_type 'yarn'"),
    ({"use_sliding_window": True}, "sliding windows"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
  ],
)
def test_what_is_not_computed_is_refused(change, words):
  config = json.loads((load_golden("qwen3").path / "config_flat.json").read_text())
  with pytest.raises(UserError, match=words):
    TextDecoderConfig.from_reference(config | change)


def test_rows_do_not_depend_on_padding_or_neighbours():
  model, params, x, mask, positions = tiny()
  hidden = run(model, params, x, positions, mask).hidden
  for row in (1, 2):
    valid = mask[row]
    one = x[row, valid][None], positions[row][:, valid][None], valid[valid][None]
    alone = run(model, params, *one).hidden
    assert relative_error(hidden[row, valid], alone[0]) < 1e-5


def test_axes_of_positions_matter():
  model, params, x, mask, positions = tiny()
  hidden = run(model, params, x, positions, mask).hidden
  for axis in range(3):
    moved = positions.copy()
    moved[0, axis, 3:] += 5
    assert relative_error(run(model, params, x, moved, mask).hidden[0], hidden[0]) > 1e-3


def test_cache_in_pieces_equals_one_pass():
  """A prompt, then extra positions, then single tokens inside lax.scan, over one cache with room to spare."""
  model, params, x, mask, positions = tiny()
  later = jax.random.normal(jax.random.key(3), (3, 5, TINY.dim))
  start = positions.max(-1, keepdims=True) + 1
  later_positions, later_mask = start + np.arange(5), np.ones((3, 5), bool)
  whole = run(
    model,
    params,
    jnp.concatenate([x, later], 1),
    np.concatenate([positions, later_positions], -1),
    np.concatenate([mask, later_mask], -1),
  ).hidden

  @jax.jit
  def pieces(params):
    cache = KVCache.empty(TINY, 3, 9)
    prompt = run(model, params, x, positions, mask, cache)
    middle = run(model, params, later[:, :2], later_positions[..., :2], later_mask[:, :2], prompt.cache.grow(4))

    def step(cache, i):
      cut = lambda a, axis: jax.lax.dynamic_slice_in_dim(jnp.asarray(a), i, 1, axis)
      output = run(model, params, cut(later, 1), cut(later_positions, 2), cut(later_mask, 1), cache)
      return output.cache, output.hidden[:, 0]

    cache, last = jax.lax.scan(step, middle.cache, jnp.arange(2, 5))
    return prompt.hidden, middle.hidden, jnp.swapaxes(last, 0, 1), cache

  prompt, middle, last, cache = pieces(params)
  assert relative_error(prompt[mask], whole[:, :7][mask]) < 1e-5
  assert relative_error(jnp.concatenate([middle, last], 1), whole[:, 7:]) < 1e-5
  assert int(cache.index) == 12 and cache.mask.shape == (3, 13)
  np.testing.assert_array_equal(cache.mask, np.concatenate([mask, later_mask, np.zeros((3, 1), bool)], 1))


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_gradient_of_queries_over_a_constant_prompt(remat):
  """The prefix pass: queries after a cached prompt have the gradients of one pass over prompt and queries."""
  _, params, x, mask, positions = tiny()
  model = TextDecoder(TextDecoderConfig(**{**TINY.__dict__, "remat": remat}))
  queries = jax.random.normal(jax.random.key(4), (4, TINY.dim))
  start = positions.max(-1, keepdims=True) + 1
  query_positions, query_mask = start + np.arange(4), np.ones((3, 4), bool)

  def over_cache(queries):
    cache = run(model, params, x, positions, mask, KVCache.empty(TINY, 3, 11)).cache
    cache = jax.lax.stop_gradient(cache)
    rows = jnp.broadcast_to(queries, (3, 4, TINY.dim))
    return jnp.sum(run(model, params, rows, query_positions, query_mask, cache).hidden ** 3)

  def at_once(queries):
    rows = jnp.concatenate([x, jnp.broadcast_to(queries, (3, 4, TINY.dim))], 1)
    both = np.concatenate([positions, query_positions], -1), np.concatenate([mask, query_mask], -1)
    return jnp.sum(run(TextDecoder(TINY), params, rows, *both).hidden[:, 7:] ** 3)

  assert relative_error(jax.jit(jax.grad(over_cache))(queries), jax.jit(jax.grad(at_once))(queries)) < 1e-5


def test_every_parameter_carries_names_of_its_axes():
  boxed = jax.eval_shape(lambda: TextDecoder(TINY).init(jax.random.key(0), method="touch")["params"])
  leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  for leaf in leaves:
    assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == leaf.value.ndim
  layers = jax.tree.leaves(boxed["layers"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert all(leaf.names[0] == "layers" and leaf.value.shape[0] == TINY.layers for leaf in layers)


def test_bfloat16_compute():
  _, params, x, mask, positions = tiny()
  model = TextDecoder(TINY, dtype=jnp.bfloat16)
  output = run(model, params, x, positions, mask, KVCache.empty(TINY, 3, 7, jnp.bfloat16))
  assert output.hidden.dtype == output.cache.k.dtype == jnp.bfloat16
  assert run(model, params, output.hidden, method="logits").dtype == jnp.float32
