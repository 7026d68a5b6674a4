"""Two stages with the real parts: a VAE from scratch on the shapes world, then a CLIP encoder from its model."""

import json

import numpy as np
import pytest

from blip3o_jax.data import shapes_corpus
from blip3o_jax.data.tokenizer import train_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.porting import model_dir
from blip3o_jax.porting.locate import open_model
from blip3o_jax.training import metrics, trainer
from blip3o_jax.training.defaults import default_config

SMALL = {
  "vae": {"block_out_channels": (8,), "norm_groups": 4},
  "clip": {"width": 24, "layers": 2, "mlp_dim": 32},
  "text_tower": {"text": {"dim": 16, "layers": 1, "mlp_dim": 32, "heads": 2, "kv_heads": 2, "head_size": 8}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  out = tmp_path_factory.mktemp("world")
  shapes_corpus.make_shapes(
    out / "data", contrastive=48, pretrain=0, instruct=0, understanding=0, text_only=0, held_out=0, shard_size=24
  )
  train_tokenizer(["a red circle left of a blue square"] * 4, 320).save(out / "tokenizer")
  return out


def config(world, **changes):
  config = default_config()
  config.update(steps=4, batch_size=8, compute_dtype="float32", log_every=1, save_every=2)
  config.optimizer.learning_rate = 2e-3
  config.schedule.name = "constant"
  config.model.overrides = SMALL
  config.data = {"task": "images", "path": str(world / "data/contrastive"), "image_size": 64}
  config.objective, config.trainable = "autoencoding", ("vae/",)
  with config.ignore_type():
    config.update(changes)
  return config


@pytest.fixture(scope="module")
def vae_run(world, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("vae")
  return trainer.train(config(world), workdir, command="blip3o train --config vae.py")


def test_first_stage(vae_run):
  lines = metrics.read(vae_run.workdir / "metrics.jsonl")
  assert lines[-1]["loss"] < lines[0]["loss"] and {"l1", "mse", "kl"} <= set(lines[0])
  manifest = model_dir.read_manifest(vae_run.model_dir)
  assert set(manifest.components) == {"vae"}
  (stage,) = manifest.provenance
  assert stage["objective"] == "autoencoding" and stage["metrics"]["step"] == 4 and stage["seconds"] >= 0
  assert stage["command"] == "blip3o train --config vae.py"
  read = open_model(vae_run.model_dir).read(("vae",))["vae"]
  assert all(np.isfinite(x).all() for x in trainer.jax.tree.leaves(read))


def test_second_stage_carries_the_first_over(world, vae_run, tmp_path):
  clip = config(
    world,
    steps=2,
    objective="contrastive",
    trainable=("clip/", "text_tower/"),
    init_from=str(vae_run.model_dir),
    tokenizer=str(world / "tokenizer"),
    data={"task": "captions", "path": str(world / "data/contrastive"), "image_size": 64, "max_length": 24},
  )
  result = trainer.train(clip, tmp_path / "clip")
  manifest = model_dir.read_manifest(result.model_dir)
  assert set(manifest.components) == {"vae", "clip", "text_tower"} and len(manifest.provenance) == 2
  assert open_model(result.model_dir).content_hash("vae") == open_model(vae_run.model_dir).content_hash("vae")
  assert (result.model_dir / "tokenizer/tokenizer.json").exists()


def test_a_frozen_part_that_is_nowhere_is_refused(world, vae_run, tmp_path):
  decoder = config(world, objective="decoding", trainable=("unet/",), init_from=str(vae_run.model_dir))
  with pytest.raises(UserError, match="has no clip, which is frozen here"):
    trainer.train(decoder, tmp_path)


def test_other_frozen_weights_on_resume_are_refused(world, vae_run, tmp_path):
  """Part of the VAE trains, the rest comes from a directory whose content changes between two starts."""
  copy = tmp_path / "init"
  model_dir.write(copy, preset="micro", overrides=SMALL, params=open_model(vae_run.model_dir).read(("vae",)))
  part = config(world, trainable=("vae/decoder",), init_from=str(copy), max_bad_steps=1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "export", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      trainer.train(part, tmp_path / "run")
  manifest = json.loads((copy / "model.json").read_text())
  manifest["components"]["vae"]["hash"] = "another"
  (copy / "model.json").write_text(json.dumps(manifest))
  with pytest.raises(UserError, match="other weights"):
    trainer.train(part, tmp_path / "run")


def test_missing_inputs_are_told(world, tmp_path):
  for changes, words in [
    ({"init_from": str(tmp_path / "nowhere")}, "nowhere"),
    ({"data": {"task": "images", "path": str(tmp_path / "no-data")}}, "no-data"),
    ({"tokenizer": str(tmp_path / "no-tokenizer")}, "no-tokenizer"),
  ]:
    with pytest.raises(UserError, match=words):
      trainer.train(config(world, **changes), tmp_path / "run")
