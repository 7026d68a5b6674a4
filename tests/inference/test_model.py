"""The public class over a real model directory: written to disk, loaded, and asked for everything it does."""

import jax
import numpy as np
import pytest
import tiny
from helpers import relative_error
from PIL import Image

import blip3o_jax
from blip3o_jax.data import shapes_corpus, templates
from blip3o_jax.data.tokenizer import train_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.inference import image as drawing
from blip3o_jax.inference.model import Model
from blip3o_jax.porting import model_dir

QUICK = {"steps": 2, "decoder_steps": 2}
PROMPTS = ["a red circle", "a green square on a gray background and two yellow triangles above a purple cross"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  out = tmp_path_factory.mktemp("model")
  train_tokenizer(shapes_corpus.tokenizer_texts(), shapes_corpus.VOCABULARY).save(out / "tokenizer")
  return model_dir.write(
    out / "tiny",
    preset="micro",
    overrides=tiny.OVERRIDES,
    params=tiny.params(),
    tokenizer_dir=out / "tokenizer",
    sampling=QUICK,
  )


@pytest.fixture(scope="module")
def model(directory):
  return blip3o_jax.load(directory)


@pytest.fixture(scope="module")
def picture():
  return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def near(a, b):
  """Same picture: batches of other sizes may round differently."""
  return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def with_params(model, *names):
  part = {name: model.params[name] for name in names}
  return Model(model.model, part, model.tokenizer, model.processor, model.sampling, name="part")


def test_load(model, directory):
  assert isinstance(model, Model) and set(model.params) == set(tiny.params()) - {"text_tower"}
  for name in model.params:
    jax.tree.map(np.testing.assert_array_equal, model.params[name], tiny.params()[name])
  assert model.model.cfg == tiny.config() and model.sampling == drawing.Sampling(**QUICK)
  assert len(model.tokenizer) == 640 and model.processor.patch_size == 8
  assert model.content_hash("vae") == model_dir.content_hash(directory, "vae")
  assert model.tokenizer.image_pad == model.model.cfg.backbone.image_token
  assert model.tokenizer.vision_start == model.model.cfg.backbone.vision_start


def test_generate(model):
  """Lists by prompt; picture i depends on (prompt, seed, i) alone."""
  pictures = model.generate(PROMPTS, num=2, seed=3)
  assert [len(row) for row in pictures] == [2, 2]
  assert all(p.shape == (16, 16, 3) and p.dtype == np.uint8 for row in pictures for p in row)
  ((alone, _),) = model.generate(PROMPTS[1], num=2, seed=3)
  assert near(alone, pictures[1][0])
  np.testing.assert_array_equal(model.generate(PROMPTS, num=2, seed=3), pictures)
  for other in (pictures[0][1], pictures[1][0], model.generate(PROMPTS, num=2, seed=4)[0][0]):
    assert not near(other, pictures[0][0])
  model.batch_size = 2  # the same work in parts; the last one filled up
  try:
    parts = model.generate([*PROMPTS, PROMPTS[0]], num=1, seed=3)
  finally:
    model.batch_size = 32
  assert near(parts[0][0], pictures[0][0]) and near(parts[1][0], pictures[1][0]) and near(parts[2][0], parts[0][0])
  assert [len(row) for row in parts] == [1, 1, 1] and model.generate([]) == []


def test_the_null_of_the_decoder(model, monkeypatch):
  """A picture drawn for one space without a template (spec 6.5), the features of a blank picture, or zeros."""
  seen = []
  decode = Model._decode

  def spy(self, features, null, keys, sampling):
    seen.append((np.asarray(features), np.asarray(null)))
    return decode(self, features, null, keys, sampling)

  monkeypatch.setattr(Model, "_decode", spy)
  for kind in drawing.DECODER_NULLS:
    model.generate(PROMPTS[:1], seed=3, decoder_null=kind)
  (features, generated), (_, blank), (_, zeros) = seen
  tokens = [*model.tokenizer.encode(" "), model.tokenizer.image_start]
  assert len(tokens) == 2
  keys = drawing.picture_keys(3, np.zeros(1))
  positions = np.broadcast_to(np.arange(2), (1, 3, 2)).astype(np.int32)
  prompt = np.asarray([tokens], np.int32), np.ones((1, 2), bool), positions
  want = drawing.draw_features(
    model.model, model.params, *prompt, keys, steps=2, guidance=3.0, exact_times=False, draw=1
  )
  assert relative_error(generated, want) < 1e-4
  np.testing.assert_array_equal(blank, drawing.null_image_features(model.model, model.params))
  assert not zeros.any() and zeros.shape == features.shape
  # And the prompt itself is the release's, with the plain count of positions.
  tokens = templates.generation_prompt(model.tokenizer, PROMPTS[0])
  arrays = model._prompt_arrays([tokens, tokens[:5]])
  assert arrays[0].shape == (2, 32) and arrays[1].sum(axis=-1).tolist() == [len(tokens), 5]
  assert arrays[0][0, : len(tokens)].tolist() == tokens and (arrays[2] == np.arange(32)).all()


def test_reconstruct_and_features(model, picture, tmp_path):
  """From an image, an array or a file; squashed to the square of the encoder; each alone like in a batch."""
  picture.save(tmp_path / "a.png")
  square = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC))
  features = model.features([picture, np.asarray(picture), str(tmp_path / "a.png")])
  assert features.shape == (3, 4, 16) and features.dtype == np.float32
  want = np.asarray(drawing.encode_features(model.model, model.params, square[None]))
  for row in features:
    assert relative_error(row, want[0]) < 1e-5
  (alone,) = model.reconstruct(picture, seed=2)
  beside = model.reconstruct([Image.new("RGB", (8, 8)), tmp_path / "a.png"], seed=2)
  null = drawing.null_image_features(model.model, model.params)
  direct = drawing.draw_pixels(
    model.model, model.params, want, null, drawing.picture_keys(2, np.zeros(1)), steps=2, guidance=3.0
  )
  assert len(beside) == 2 and near(alone, direct[0]) and near(alone, beside[1]) and not near(alone, beside[0])


def test_answers(model, picture):
  """A batch with and without pictures answers each as alone; the picture is read."""
  dark, question = Image.new("RGB", (64, 32), (200, 30, 20)), "what colour is the circle?"
  words = model.answer([picture, None, dark], [question, "is red a colour?", question], max_new_tokens=4)
  assert len(words) == 3 and all(isinstance(w, str) for w in words)
  assert words[0] == model.chat(question, images=picture, max_new_tokens=4)
  assert words[1] == model.chat("is red a colour?", max_new_tokens=4)
  assert words[2] == model.chat(f"<image>\n{question}", images=[dark], max_new_tokens=4)
  assert words[0] != words[2]
  assert model.answer([], []) == []


def test_bad_input_is_told_in_one_line(model, picture, directory, tmp_path):
  (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
  clip_only = with_params(model, "clip")
  cases = [
    (lambda: model.generate(" "), "prompt 0 is empty"),
    (lambda: model.generate(["a circle", ""]), "prompt 1 is empty"),
    (lambda: model.generate("a circle", num=0), "num is 0"),
    (lambda: model.generate("a circle", brightness=2), "setting 'brightness' is unknown; there are steps"),
    (lambda: model.generate("a circle", steps=0), "steps are 0"),
    (lambda: model.generate("a circle", decoder_steps=2000), "2000 steps do not fit"),
    (lambda: model.generate("a circle", wording="poem"), "'poem'"),
    (lambda: model.reconstruct(picture, brightness=2), "setting 'brightness' is unknown"),
    (lambda: model.reconstruct(tmp_path / "none.png"), "none.png: no such image"),
    (lambda: model.features(tmp_path / "broken.png"), "broken.png: not a readable image"),
    (lambda: model.features(tmp_path), "not a readable image"),
    (lambda: model.features(np.zeros((4, 4, 3))), r"a picture is float64 \[4, 4, 3\]; give uint8"),
    (lambda: model.chat("  "), "the prompt is empty"),
    (lambda: model.chat("what is this?", images=[tmp_path / "none.png"]), "none.png: no such image"),
    (lambda: model.chat("what is <image>?"), "0 pictures but 1 <image>"),
    (lambda: model.chat("what?", max_new_tokens=0), "max_new_tokens is 0"),
    (lambda: model.answer([None], ["a?", "b?"]), "1 pictures for 2 questions"),
    (lambda: clip_only.generate("a circle"), "part holds no backbone, queries, dit, unet, vae"),
    (lambda: clip_only.reconstruct(picture), "part holds no unet, vae"),
    (lambda: clip_only.chat("what?"), "part holds no backbone"),
    (lambda: with_params(model, "vae").features(picture), "part holds no clip"),
    (
      lambda: with_params(model, "backbone", "queries", "dit", "unet", "vae").generate("a", decoder_null="image"),
      "clip",
    ),
    (lambda: blip3o_jax.load(tmp_path / "nowhere"), "no such model"),
  ]
  for run, words in cases:
    with pytest.raises(UserError, match=words) as error:
      run()
    assert "\n" not in str(error.value)


def test_a_directory_without_a_part_serves_the_others(model, directory, picture, tmp_path):
  small = model_dir.write(
    tmp_path / "small",
    preset="micro",
    overrides=tiny.OVERRIDES,
    params={"clip": tiny.params()["clip"]},
    tokenizer_dir=directory / "tokenizer",
  )
  loaded = blip3o_jax.load(small)
  np.testing.assert_array_equal(loaded.features(picture), model.features(picture))
  with pytest.raises(UserError, match="small holds no unet, vae"):
    loaded.reconstruct(picture)
  model_dir.annotate(small, sampling={"sparkle": 1})
  with pytest.raises(UserError, match="setting 'sparkle' is unknown"):
    blip3o_jax.load(small)
  (small / "tokenizer").rmtree()
  with pytest.raises(UserError, match="no tokenizer"):
    blip3o_jax.load(small)
