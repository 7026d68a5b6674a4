"""Model directories: written whole, read back exactly, carried from stage to stage."""

import contextlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from buckets import Bucket, bucket
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.porting import convert, locate, model_dir, release, rules, source
from blip3o_jax.porting.locate import open_model

OVERRIDES = {"vae": {"block_out_channels": (8,)}, "queries": 4}
NAMES = ("queries", "vae")


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  abstract = source.abstract_params(presets.get("micro", OVERRIDES), NAMES)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), abstract)


def write(path, params, **kwargs):
  return model_dir.write(path, preset="micro", overrides=OVERRIDES, params=params, **kwargs)


def same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("format", model_dir.FORMATS)
def test_there_and_back(tmp_path, params, format):
  write(tmp_path / "m", params, format=format, sampling={"steps": 7}, provenance={"command": "blip3o train"})
  manifest = model_dir.read_manifest(tmp_path / "m")
  assert open_model(tmp_path / "m").config() == presets.get("micro", OVERRIDES)
  assert manifest.sampling == {"steps": 7} and manifest.provenance == [{"command": "blip3o train"}]
  assert set(open_model(tmp_path / "m").components) == set(NAMES)
  read = open_model(tmp_path / "m").read(NAMES)
  same(read, params)
  for name in NAMES:
    entry = manifest.components[name]
    assert entry["hash"] == convert.content_hash(convert.to_reference(rules.get(name), params[name]))
    assert entry["hash"] == open_model(tmp_path / "m").content_hash(name)
    assert (entry["format"], entry["dtype"]) == (format, "float32")
    assert entry["parameters"] == sum(x.size for x in jax.tree.leaves(params[name]))
  assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("format", model_dir.FORMATS)
def test_dtype_and_sharding(tmp_path, params, format):
  write(tmp_path / "m", {"vae": params["vae"]}, format=format, dtype=jnp.bfloat16)
  assert model_dir.read_manifest(tmp_path / "m").components["vae"]["dtype"] == "bfloat16"
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  spec = NamedSharding(mesh, PartitionSpec())
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=spec), params)
  read = open_model(tmp_path / "m").read(("vae",), abstract)
  for ours, theirs in zip(jax.tree.leaves(read["vae"]), jax.tree.leaves(params["vae"]), strict=True):
    assert ours.dtype == jnp.float32 and ours.sharding == spec
    np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16).astype(np.float32))
  read = open_model(tmp_path / "m").read(("vae",), dtype=jnp.float16)
  assert {x.dtype for x in jax.tree.leaves(read)} == {np.dtype(np.float16)}


def test_carried_parts(tmp_path, params):
  (tmp_path / "tokens").mkdir()
  (tmp_path / "tokens" / "tokenizer.json").write_text("{}")
  first = write(
    tmp_path / "a",
    params,
    tokenizer_dir=tmp_path / "tokens",
    preprocessor={"patch_size": 5},
    sampling={"steps": 7, "guidance": 2.0},
    provenance={"stage": 1},
  )
  new = {"queries": jax.tree.map(lambda x: x + 1, params["queries"])}
  second = write(tmp_path / "b", new, carry_from=open_model(first), sampling={"steps": 9}, provenance={"stage": 2})
  same(open_model(second).read(NAMES), {"vae": params["vae"]} | new)
  manifest = model_dir.read_manifest(second)
  assert manifest.sampling == {"steps": 9, "guidance": 2.0}
  assert manifest.provenance == [{"stage": 1}, {"stage": 2}]
  assert open_model(first).content_hash("vae") == open_model(second).content_hash("vae")
  assert open_model(first).content_hash("queries") != open_model(second).content_hash("queries")
  assert (open_model(second).tokenizer_dir() / "tokenizer.json").read_text() == "{}"
  assert open_model(second).image_preprocessor() == {"patch_size": 5}
  weights = "weights/vae/model.safetensors"
  assert os.stat(first / weights).st_ino == os.stat(second / weights).st_ino  # no second copy of what did not change

  model_dir.annotate(second, provenance={"score": 0.5}, sampling={"steps": 3})
  manifest = model_dir.read_manifest(second)
  assert manifest.provenance == [{"stage": 1}, {"stage": 2, "score": 0.5}] and manifest.sampling["steps"] == 3


def test_another_format_keeps_the_hash(tmp_path, params):
  write(tmp_path / "a", params, dtype=jnp.bfloat16, provenance={"stage": 1})
  b = model_dir.convert_model(open_model(tmp_path / "a"), tmp_path / "b", format="orbax")
  c = model_dir.convert_model(open_model(b), tmp_path / "c", format="safetensors")
  a, b, c = (model_dir.read_manifest(tmp_path / name) for name in "abc")
  assert a == c and {x: b.components[x] | {"format": "safetensors"} for x in b.components} == a.components


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path, params, monkeypatch):
  write(tmp_path / "m", params)
  new = {"queries": jax.tree.map(lambda x: x + 1, params["queries"])}
  with monkeypatch.context() as patch:
    patch.setattr(
      model_dir, "_write_manifest", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="No space left"):
      write(tmp_path / "m", new)
  same(open_model(tmp_path / "m").read(NAMES), params)
  write(tmp_path / "m", new)
  assert open_model(tmp_path / "m").components == ("queries",)
  assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_nothing_else_is_overwritten(tmp_path, params):
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(UserError, match="not empty and not a model directory"):
    write(tmp_path, params)
  assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_model_with_something_added_is_left_alone(tmp_path, params):
  path = write(tmp_path / "m", params)
  (path / "scores.txt").write_text("0.84")
  with pytest.raises(UserError, match=r"m: holds scores.txt, which is no part of a model and would be lost"):
    write(path, params)
  same(open_model(path).read(NAMES), params)


def test_what_a_link_points_at_is_replaced(tmp_path, params):
  write(tmp_path / "disk" / "m", params)
  (tmp_path / "m").symlink_to(tmp_path / "disk" / "m")
  write(tmp_path / "m", {"queries": params["queries"]})
  assert (tmp_path / "m").is_symlink() and open_model(tmp_path / "disk" / "m").components == ("queries",)
  assert [path.name for path in (tmp_path / "disk").iterdir()] == ["m"]


class Killed(BaseException):
  pass


@contextlib.contextmanager
def killed_at(count, monkeypatch):
  """The program dies where it would move or remove its `count`-th file of gs://b/run/model."""
  left = iter(range(count))

  def dying(act):
    def touch(bucket, path, *args, **kwargs):
      if "/model" in str(path) and next(left, None) is None:
        raise Killed
      return act(bucket, path, *args, **kwargs)

    return touch

  with monkeypatch.context() as patch:
    for name in ("cp_file", "rm"):
      patch.setattr(Bucket, name, dying(getattr(Bucket, name)))
    yield


@pytest.mark.parametrize("format", ["model", "release"])
def test_killed_at_any_moment_in_a_bucket(params, monkeypatch, format):
  """A bucket has no rename. What marks a model as complete is never there without all the rest."""
  new, target = jax.tree.map(lambda x: x + 1, params), "gs://b/run/model"

  def put(name):
    if format == "release":
      release.write(open_model(f"gs://b/{name}"), target)
    else:
      write(target, {"old": params, "new": new}[name])

  with bucket() as files:
    write("gs://b/old", params)
    write("gs://b/new", new)
    put("old")
    before = dict(files.store)
    for count in range(100):
      files.store.clear()
      files.store.update(before)
      try:
        with killed_at(count, monkeypatch):
          put("new")
        break
      except Killed:
        if format == "release":
          with pytest.raises(UserError, match="was not written to its end; write it again"):
            open_model(target)
        elif files.exists(f"{target}/model.json"):
          found = open_model(target).read(NAMES)
          first = lambda tree: tree["queries"]["latent_queries"][0, 0]
          same(found, new if first(found) == first(new) else params)
      put("new")  # what lies there is not in the way
      same(open_model(target).read(NAMES), new)
    assert count > 4
    same(open_model(target).read(NAMES), new)
    assert not [name for name in files.find("gs://b/run") if "/." in name]


def test_bad_directories(tmp_path, params):
  with pytest.raises(UserError, match="no such model"):
    locate.find(tmp_path / "absent")
  with pytest.raises(UserError, match="not a model directory"):
    model_dir.read_manifest(tmp_path)
  path = write(tmp_path / "m", params)
  with pytest.raises(UserError, match="no component 'dit'"):
    open_model(path).read(("dit",))
  with pytest.raises(UserError, match="no tokenizer"):
    open_model(path).tokenizer_dir()

  content = json.loads((path / "model.json").read_text())
  content["overrides"]["queries"] = 5
  (path / "model.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"latent_queries: expected \[1, 5, 128\], found \[1, 4, 128\]"):
    open_model(path).read(("queries",))
  (path / "model.json").write_text(json.dumps(content | {"format_version": 99}))
  with pytest.raises(UserError, match="newer|update"):
    model_dir.read_manifest(path)
  (path / "model.json").write_text("{")
  with pytest.raises(UserError, match="damaged"):
    model_dir.read_manifest(path)


@pytest.mark.parametrize("queries", [3, 5])
def test_orbax_arrays_of_another_shape_are_refused(tmp_path, params, queries):
  path = write(tmp_path / "m", params, format="orbax")
  content = json.loads((path / "model.json").read_text())
  content["overrides"]["queries"] = queries
  (path / "model.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match="of another model"):
    open_model(path).read(("queries",))


@pytest.mark.parametrize(
  ("changes", "text"),
  [({"format": "pickle"}, "unknown"), ({"preset": "macro"}, "unknown"), ({"overrides": {"dti": 1}}, "not a field")],
)
def test_bad_arguments(tmp_path, params, changes, text):
  with pytest.raises(UserError, match=text):
    model_dir.write(tmp_path / "m", **({"preset": "micro", "overrides": OVERRIDES, "params": params} | changes))
  assert not list(tmp_path.iterdir())
