"""The exact speed-ups in real runs: the losses and gradients of the plain run."""

import math

import jax
import numpy as np
import pytest
import tiny
from jax.extend.core import jaxprs_in_params

from blip3o_jax.data import pipeline, shapes_corpus
from blip3o_jax.errors import UserError
from blip3o_jax.jobs import cache_features
from blip3o_jax.porting import model_dir
from blip3o_jax.training import feed, metrics, trainer
from blip3o_jax.training.defaults import default_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """A small world, and a model that reads its words."""
  sizes = {"contrastive": 0, "pretrain": 48, "instruct": 0, "understanding": 0, "text_only": 0, "held_out": 0}
  corpus = shapes_corpus.make_shapes(tmp_path_factory.mktemp("corpus") / "shapes", **sizes)
  parts = {name: tiny.params()[name] for name in ("backbone", "queries", "dit", "clip")}
  folder = corpus / "tokenizer"
  model_dir.write(corpus / "model", preset="micro", overrides=tiny.OVERRIDES, params=parts, tokenizer_dir=folder)
  return corpus


@pytest.fixture(scope="module")
def cache(corpus):
  """The features of its pictures, in float32."""
  out = corpus / "features"
  cache_features.run(str(corpus / "model"), str(corpus / "pretrain"), out, dtype="float32", batch_size=8)
  return str(out)


TEXT = tiny.OVERRIDES["backbone"]["text"]


def config(corpus, prefix_pass=True, **data):
  config = default_config()
  config.update(steps=4, batch_size=2, compute_dtype="float32", log_every=1, seed=0)
  config.model.overrides, config.objective_args = tiny.OVERRIDES, {"prefix_pass": prefix_pass}
  config.init_from = str(corpus / "model")
  config.mesh.data = 1
  config.data = {"task": "generation", "path": str(corpus / "pretrain"), "image_size": 16, "max_length": 64} | data
  return config


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
  """Train by a config; returns what was logged of each step."""

  def run(config):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax, "jit", tiny.quick_jit)
      return metrics.read(trainer.train(config, tmp_path_factory.mktemp("run")).workdir / "metrics.jsonl")

  return run


@pytest.fixture(scope="module")
def plain(corpus, run):
  return run(config(corpus, prefix_pass=False))


def test_all_of_them_change_nothing(corpus, cache, run, plain, monkeypatch, capsys):
  lengths = []
  cut = feed.Buckets._cut_to
  monkeypatch.setattr(feed.Buckets, "_cut_to", lambda *args: lengths.append(args[2]) or cut(*args))
  loader = feed.open_loader(config(corpus), tiny.config())(0)
  longest = [next(loader)["token_mask"].sum(axis=-1).max() for _ in range(4)]
  bucket = int(min(longest))
  ours = run(config(corpus, task="features", path=cache, buckets=(bucket,)))
  assert lengths[:2] == [bucket, 64]
  assert lengths[2:6] == [bucket if n == bucket else 64 for n in longest] and max(longest) > bucket
  told = capsys.readouterr().out
  assert "clip" not in told.partition("step 1/4")[0], "the encoder is not needed, so it must not be read"
  assert told.index("compiled for 64 tokens") < told.index("step 1/4")  # all of them before the first step
  for key, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
    np.testing.assert_allclose([line[key] for line in ours], [line[key] for line in plain], rtol=tolerance)


def test_stale_features_are_refused(corpus, cache, tmp_path):
  """Other weights, and another way to a square."""
  parts = {name: tiny.params(seed=1 if name == "clip" else 0)[name] for name in ("backbone", "queries", "dit", "clip")}
  model_dir.write(tmp_path, preset="micro", overrides=tiny.OVERRIDES, params=parts, tokenizer_dir=corpus / "tokenizer")
  other = config(corpus, task="features", path=cache)
  other.init_from = str(tmp_path)
  squashed = config(corpus, task="features", path=cache, resize="squash")
  for stale, words in [(other, "stale features, weights was '"), (squashed, "resize was 'crop', is 'squash'")]:
    with pytest.raises(UserError, match=words):
      feed.open_loader(stale, tiny.config())
  feed.open_loader(config(corpus, task="features", path=cache), tiny.config())


# ---- what the step computes, read off its program

B, L, Q = 2, 37, 4  # L is no other size of the tiny model


def operations(jaxpr, times=1):
  """(how often, equation) of everything in a program, loops counted."""
  for equation in jaxpr.eqns:
    yield times, equation
    inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
    for sub in jaxprs_in_params(equation.params):
      yield from operations(sub, inner)


def weight_flops(jaxpr):
  """Of the products with weights (those without a batch dimension)."""
  total = 0
  for times, equation in operations(jaxpr):
    if equation.primitive.name == "dot_general":
      (contracted, _), (batch, _) = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      ops = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
      total += 0 if batch else times * ops
  return total


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "whole"])
def programs(request):
  """(whether the prefix pass is on, program of the step at a length, program of the query states without gradient)."""
  config = default_config()
  config.update(batch_size=B, compute_dtype="float32", objective_args={"prefix_pass": request.param})
  config.model.overrides, config.mesh.data = tiny.OVERRIDES, 1
  program = trainer.build(trainer.complete(config), trainer.make_mesh(config.mesh, batch_size=B))

  def rows(length):
    tokens, mask, positions = tiny.prompts([length, 3], pad_to=length)
    return {"tokens": tokens, "token_mask": mask, "positions": positions}

  def step(length):
    batch = rows(length) | {"pixels": tiny.pixels(B)}
    with jax.set_mesh(program.mesh):
      return jax.make_jaxpr(program.step)(program.state, program.frozen, batch).jaxpr

  def forward(length):
    call = lambda params, *rows: program.model.apply({"params": params}, *rows, method="query_states")
    return jax.make_jaxpr(call)(program.params, *rows(length).values()).jaxpr

  return request.param, step, forward


def test_the_prompt_has_no_backward_pass(programs):
  """Each token of the prompt costs a step what it costs a forward pass; without the prefix pass, twice that."""
  prefix, step, forward = programs
  added = weight_flops(step(2 * L)) - weight_flops(step(L))
  assert added == (1 if prefix else 2) * (weight_flops(forward(2 * L)) - weight_flops(forward(L))) > 0


def test_only_keys_and_values_of_the_prompt_are_kept(programs):
  """Of what the layers leave for later, [layers, B, tokens, ...], nothing else has the prompt's tokens."""
  prefix, step, _ = programs
  scans = [equation for _, equation in operations(step(L)) if equation.primitive.name == "scan"]
  left = [out.aval.shape for scan in scans for out in scan.outvars[scan.params["num_carry"] :]]
  keys = [(TEXT["layers"], B, n, TEXT["kv_heads"], TEXT["head_size"]) for n in (L, L + Q)]
  assert keys[0] in left or not prefix
  assert prefix == all(shape in keys for shape in left if len(shape) > 2 and shape[2] in (L, L + Q))


def test_no_logits_over_the_vocabulary(programs):
  _, step, _ = programs
  vocab = tiny.config().backbone.text.vocab
  produced = {
    out.aval.shape for _, op in operations(step(L)) if op.primitive.name == "dot_general" for out in op.outvars
  }
  assert produced and not any(vocab in shape for shape in produced)


# ---- length buckets


def test_a_bucket_holds_the_longest_row():
  """Of all processes: the rows are those of the global batch."""
  mask = lambda *lengths: np.arange(10) < np.array(lengths)[:, None]
  masks = [mask(3, 4), mask(1, 1), mask(4, 5), mask(2, 7), mask(8, 10), mask(0, 0)]
  batches = iter([{"token_mask": jax.numpy.asarray(m), "pixels": jax.numpy.zeros((2, 3))} for m in masks])
  sharding = jax.sharding.NamedSharding(trainer.make_mesh({"data": 1}, batch_size=2), jax.sharding.PartitionSpec())
  buckets = feed.Buckets(batches, (4, 7), sharding)
  for longest, want in zip(masks[:-1], [4, 4, 7, 7, 10], strict=True):
    batch = next(buckets)
    np.testing.assert_array_equal(batch["token_mask"], longest[:, :want])
    assert batch["pixels"].shape == (2, 3)


@pytest.mark.parametrize("buckets", [(32, 32), (0, 8), (8, 64), (64, 128)])
def test_bad_buckets(buckets):
  with pytest.raises(UserError, match="must rise and stay below max_length 64"):
    pipeline.DataConfig("generation", "somewhere", max_length=64, buckets=buckets)


def test_pictures_alone_have_no_buckets():
  with pytest.raises(UserError, match="task images has none"):
    pipeline.DataConfig("images", "somewhere", buckets=(8,))
