"""Several models as one, each as it lies on disk: parts from the first that has them, and eyes for Qwen3."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from helpers import load_golden, relative_error
from safetensors.numpy import save_file

from blip3o_jax.data.shapes_corpus import VOCABULARY, tokenizer_texts
from blip3o_jax.data.tokenizer import train_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.qwen3_siglip import Qwen3Siglip, Qwen3SiglipConfig
from blip3o_jax.porting import model_dir
from blip3o_jax.porting.locate import convert_model, open_model, open_models
from blip3o_jax.porting.source import abstract_params


def test_several_models_become_one(tmp_path):
  """Each part from the first that has it, with its sizes: how a pretraining run gets its frozen parts."""
  train_tokenizer(tokenizer_texts(), VOCABULARY).save(tmp_path / "tokenizer")
  whole = model_dir.write(
    tmp_path / "whole",
    preset="micro",
    overrides=tiny.OVERRIDES,
    params=tiny.params(),
    tokenizer_dir=tmp_path / "tokenizer",
  )
  convert_model(whole, tmp_path / "backbone", format="safetensors", part="backbone")
  changes = {"clip": tiny.OVERRIDES["clip"] | {"layers": 3}, "image_size": 32}
  clip = abstract_params(tiny.config(**changes), ("clip",))["clip"]
  other = model_dir.write(
    tmp_path / "other",
    preset="micro",
    overrides=tiny.OVERRIDES | changes,
    params={"clip": jax.tree.map(lambda x: np.ones(x.shape, x.dtype), clip), "vae": tiny.params()["vae"]},
  )
  convert_model([tmp_path / "backbone", other, whole], tmp_path / "start")
  start, whole = open_model(tmp_path / "start"), open_model(whole)
  assert set(start.components) == set(whole.components)
  for name in set(whole.components) - {"clip"}:
    assert start.content_hash(name) == whole.content_hash(name)
  assert start.content_hash("clip") == open_model(other).content_hash("clip")
  assert start.config().clip.layers == 3 and start.config().image_size == whole.config().image_size
  assert start.tokenizer is not None
  with pytest.raises(UserError, match="nowhere: no such model"):
    convert_model([other, "nowhere"], tmp_path / "x")


def test_models_that_read_different_tokens_do_not_become_one(tmp_path):
  train_tokenizer(["a yellow square"], VOCABULARY).save(tmp_path / "tokenizer")
  vae = {"vae": tiny.params()["vae"]}
  changed = model_dir.write(
    tmp_path / "other", preset="micro", overrides=tiny.OVERRIDES, params=vae, tokenizer_dir=tmp_path / "tokenizer"
  )
  with pytest.raises(UserError, match=r"tokenizers .* differ in .* weights that learned one cannot read the other"):
    convert_model([changed, "micro"], tmp_path / "start")
  assert not (tmp_path / "start").exists()


def test_a_part_that_comes_first_brings_itself_alone(tmp_path):
  """A UNet alone says nothing of scheduler, text tower or picture size: those are of the model that has them."""
  whole = open_model("micro")
  convert_model("micro", tmp_path / "unet", format="safetensors", part="unet")
  convert_model([tmp_path / "unet", "micro"], tmp_path / "start")
  start = open_model(tmp_path / "start")
  assert start.preset == "micro" and set(start.components) == set(whole.components)
  assert start.config().decoder_process == whole.config().decoder_process
  assert start.config().text_tower == whole.config().text_tower and start.sampling == whole.sampling
  assert start.content_hash("unet") == whole.content_hash("unet")


def test_qwen3_gets_eyes(tmp_path):
  """Both public checkpoints as they lie; the projector is fresh; EVA-CLIP, which came first, is what is drawn."""
  text, tower, clip = load_golden("qwen3"), load_golden("siglip"), load_golden("eva_clip")
  for name, golden, extra in (("qwen3", text, {}), ("siglip", tower, {"logit_scale": np.ones(1, np.float32)})):
    (tmp_path / name).mkdir()
    save_file(dict(golden.weights) | extra, tmp_path / name / "model.safetensors")
  config = {"vision_config": tower.config}
  (tmp_path / "siglip" / "config.json").write_text(json.dumps(config))
  size = tower.config["image_size"]
  seen = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": size, "width": size}, "resample": 2}
  (tmp_path / "siglip" / "preprocessor_config.json").write_text(json.dumps(seen))
  (tmp_path / "qwen3" / "config.json").write_text(json.dumps(text.config))
  (tmp_path / "eva").mkdir()
  shutil.copyfile(clip.path / "weights.safetensors", tmp_path / "eva" / "model.safetensors")
  (tmp_path / "eva" / "config.json").write_text(json.dumps(clip.config))

  assert open_model(tmp_path / "siglip").components == ("clip",)
  convert_model([tmp_path / "qwen3", tmp_path / "eva", tmp_path / "siglip"], tmp_path / "start")
  start = open_model(tmp_path / "start")
  cfg = start.config()
  assert start.preset == "blip3o-qwen3-siglip2" and set(start.components) == {"backbone", "clip"}
  assert isinstance(cfg.backbone, Qwen3SiglipConfig) and cfg.backbone.image_token == cfg.backbone.text.vocab - 1
  assert cfg.dit.rope == presets.get("blip3o-qwen3-siglip2").dit.rope and cfg.dit.condition_dim == cfg.backbone.dim
  assert start.image_preprocessor() == seen
  assert start.content_hash("clip") == open_model(tmp_path / "eva").content_hash("clip")

  params = start.read(("backbone",))["backbone"]
  run = lambda *args, method: Qwen3Siglip(cfg.backbone).apply({"params": params}, *args, method=method)
  images = tower.io["pixel_values"].transpose(0, 2, 3, 1)
  features = run(images, method=lambda module, x: module.vision_tower(x).last_hidden_state)
  assert relative_error(features, tower.io["last_hidden_state"]) < 1e-4
  np.testing.assert_array_equal(params["text"]["embedding"], text.weights["model.embed_tokens.weight"])
  for name, fan_in in (("fc1", tower.config["hidden_size"]), ("fc2", cfg.backbone.dim)):
    kernel = np.asarray(params["projector"][name]["kernel"])
    assert 0.9 < np.abs(kernel).max() * fan_in**0.5 <= 1 and abs(kernel.mean()) < 0.1 * np.abs(kernel).max()


def small(path, name, rename=lambda key: key):
  """A recording's weights and config as a model on disk."""
  golden = load_golden(name)
  path.mkdir()
  save_file({rename(key): array for key, array in golden.weights.items()}, path / "model.safetensors")
  (path / "config.json").write_text(json.dumps(golden.config))
  return path


def test_siglip_as_newer_transformers_save_it(tmp_path):
  """Without `vision_model.` before its keys."""
  old = open_model(small(tmp_path / "old", "siglip"))
  new = open_model(small(tmp_path / "new", "siglip", lambda key: key.removeprefix("vision_model.")))
  assert new.components == ("clip",) and new.config() == old.config()
  assert new.content_hash("clip") == old.content_hash("clip")
  joined = open_models([small(tmp_path / "qwen3", "qwen3"), tmp_path / "new"])
  joined.check()
  assert isinstance(joined.config().backbone, Qwen3SiglipConfig)


def test_parts_that_no_preset_has_together(tmp_path):
  models = [small(tmp_path / name, name) for name in ("llama", "siglip")]
  with pytest.raises(UserError, match=r"siglip do not go together: .* cannot have SiglipConfig as clip") as error:
    open_models(models)
  assert len(str(error.value)) < 400
