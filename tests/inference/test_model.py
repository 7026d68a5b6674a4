"""The public class over a real model directory: written to disk, loaded, and asked for everything it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from helpers import relative_error
from PIL import Image

import blip3o_jax
from blip3o_jax.data import templates
from blip3o_jax.errors import UserError
from blip3o_jax.inference import image as drawing
from blip3o_jax.inference.model import Model
from blip3o_jax.inference.prompts import Row
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.porting import model_dir
from blip3o_jax.porting.locate import open_model
from blip3o_jax.porting.preprocessor import default_preprocessor, open_pictures
from blip3o_jax.sharding.mesh import AXES

QUICK = {"steps": 2, "decoder_steps": 2}
PROMPTS = ["a red circle", "two circles"]


@pytest.fixture(scope="module")
def directory(tiny_directory):
  return tiny_directory


@pytest.fixture(scope="module")
def model(directory):
  """Draws two pictures at a time, so that one program serves all tests."""
  loaded = blip3o_jax.load(directory)
  loaded.batch_size = 2
  return loaded


@pytest.fixture(scope="module")
def picture():
  return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def near(a, b):
  """Same picture: batches of other sizes may round differently."""
  return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def arrays(model, rows):
  batch = model.prompts.batch([Row(row) for row in rows], draw=True)
  return batch.tokens, batch.mask, batch.positions


def ask(*content):
  return [{"role": "user", "content": list(content)}]


def with_params(model, *names):
  part = {name: model.params[name] for name in names}
  return Model(model.model, part, model.tokenizer, model.pictures, model.sampling, name="part")


def test_load(model, directory):
  assert isinstance(model, Model) and set(model.params) == set(tiny.params()) - {"text_tower"}
  for name in model.params:
    jax.tree.map(np.testing.assert_array_equal, model.params[name], tiny.params()[name])
  assert model.model.cfg == tiny.config() and model.sampling == drawing.Sampling(**QUICK)
  assert len(model.tokenizer) == 640 and model.pictures.processor.patch_size == 8
  assert model.content_hash("vae") == open_model(directory).content_hash("vae")
  cfg = model.model.cfg.backbone
  assert model.tokenizer.encode("<|image_pad|><|vision_start|>") == [cfg.image_token, cfg.vision_start]


def test_generate(model):
  """Lists by prompt; picture i depends on (prompt, seed, i) alone."""
  pictures = model.generate(PROMPTS, num=2, seed=3)
  assert [len(row) for row in pictures] == [2, 2]
  assert all(p.shape == (16, 16, 3) and p.dtype == np.uint8 for row in pictures for p in row)
  parts = model.generate([*reversed(PROMPTS), PROMPTS[1]], seed=3)  # other neighbours, and a part filled up
  assert [len(row) for row in parts] == [1, 1, 1]
  assert near(parts[1][0], pictures[0][0]) and near(parts[0][0], pictures[1][0]) and near(parts[2][0], parts[0][0])
  np.testing.assert_array_equal(model.generate(PROMPTS, num=2, seed=3), pictures)
  for other in (pictures[0][1], pictures[1][0], model.generate(PROMPTS, seed=4)[0][0]):
    assert not near(other, pictures[0][0])
  assert model.generate([]) == []


def test_batches(model):
  """Equal sizes, filled up with the first item, so that one program serves; powers of two below the full size."""
  assert list(model.batches([1, 2, 3, 4, 5], 2)) == [([1, 2], 2), ([3, 4], 2), ([5, 5], 1)]
  assert list(model.batches([1, 2, 3, 4, 5], 32)) == [([1, 2, 3, 4, 5, 1, 1, 1], 5)]
  assert list(model.batches([1, 2, 3], 3)) == [([1, 2, 3], 3)]
  assert list(model.batches([1], 32)) == [([1], 1)] and list(model.batches([], 32)) == []


def test_the_null_of_the_decoder(model, monkeypatch):
  """A picture drawn for one space without a template (spec 6.5), the features of a blank picture, or zeros.

  The first is drawn once, with a noise of its own, and kept for later pictures; other settings of the DiT draw anew.
  """
  seen, pictures = [], jnp.zeros((2, 16, 16, 3), jnp.uint8)
  monkeypatch.setattr(Model, "_decode", lambda self, *args: seen.append([np.asarray(x) for x in args[:2]]) or pictures)
  for kind in drawing.DECODER_NULLS:
    model.generate(PROMPTS[0], num=2, seed=3, decoder_null=kind)
  (features, generated), (_, blank), (_, zeros) = seen
  blanks = [*model.tokenizer.encode(" "), model.tokenizer.image_start]
  assert len(blanks) == 2
  draw = lambda tokens, seed, pictures, number: drawing.draw_features(
    model.model,
    model.params,
    *arrays(model, [tokens] * 2),
    drawing.picture_keys(seed, pictures),
    number,
    **{"steps": 2, "guidance": 3.0, "exact_times": False},
  )
  assert relative_error(features, draw(templates.generation_prompt(model.tokenizer, PROMPTS[0]), 3, [0, 1], 0)) < 1e-5
  assert relative_error(generated, draw(blanks, 0, [0, 0], 1)) < 1e-5
  want = drawing.null_image_features(model.model, model.params)
  np.testing.assert_array_equal(blank, np.broadcast_to(want, features.shape))
  assert not zeros.any() and zeros.shape == features.shape
  run, programs = Model._run, []
  monkeypatch.setattr(Model, "_run", lambda self, *args, **kw: programs.append(args[0]) or run(self, *args, **kw))
  model.generate(PROMPTS[1], num=2, seed=4)
  assert programs == [drawing.draw_features]
  model.generate(PROMPTS[1], num=2, seed=4, guidance=2.0)
  assert programs == [drawing.draw_features] * 3
  np.testing.assert_array_equal(seen[3][1], generated)
  assert relative_error(seen[4][1], generated) > 1e-3


def test_prompts_are_padded_on_the_right_with_plain_positions(model):
  tokens, mask, positions = arrays(model, [[5] * 20, [7, 8, 9]])
  assert tokens.shape == mask.shape == (2, 32) and positions.shape == (2, 3, 32)
  assert mask.sum(axis=-1).tolist() == [20, 3] and tokens[1, :4].tolist() == [7, 8, 9, model.tokenizer.pad]
  assert (positions == np.arange(32)).all()


def test_reconstruct_and_features(model, picture, tmp_path):
  """From an image, an array or a file; squashed to the square of the encoder; each alike beside any other."""
  picture.save(tmp_path / "a.png")
  square = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC))
  want = np.asarray(drawing.encode_features(model.model, model.params, np.stack([square, square])))
  for pair in ([picture, np.asarray(picture)], (str(tmp_path / "a.png"), tmp_path / "a.png")):
    features = model.features(pair)
    assert features.shape == (2, 4, 16) and features.dtype == np.float32
    assert relative_error(features, want) < 1e-5
  gray = Image.new("RGB", (8, 8), (90, 90, 90))
  first, second = model.reconstruct([picture, gray], seed=2), model.reconstruct([gray, tmp_path / "a.png"], seed=2)
  null = np.broadcast_to(drawing.null_image_features(model.model, model.params), want.shape)
  keys = drawing.picture_keys(2, np.zeros(2, int))
  direct = drawing.draw_pixels(model.model, model.params, want, null, keys, steps=2, guidance=3.0)
  assert len(first) == len(second) == 2 and near(first[0], direct[0])
  assert near(first[0], second[1]) and near(first[1], second[0]) and not near(first[0], first[1])
  assert not near(model.reconstruct([picture, gray], seed=3)[0], first[0])


def test_answers(model, picture):
  """A batch with and without pictures answers each as alone; the picture is read."""
  blue, question = Image.new("RGB", picture.size, (0, 0, 255)), "what colour is the circle?"
  words = model.answer([picture, None, blue], [question, "is red a colour?", question], max_new_tokens=4)
  assert len(words) == 3 and all(isinstance(w, str) for w in words)
  assert words[0] == model.chat(ask(picture, f"\n{question}"), max_new_tokens=4)
  assert words[1] == model.chat("is red a colour?", max_new_tokens=4)
  assert words[2] == model.chat(ask(blue, "\n", question), max_new_tokens=4)
  assert words[0] != words[2]
  assert model.answer([], []) == [] and list(model.chat([], stream=True)) == []


def test_bad_input_is_told_in_one_line(model, picture, directory, tmp_path):
  (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
  clip_only = with_params(model, "clip")
  cases = [
    (lambda: model.generate(" "), "^the prompt is empty"),
    (lambda: model.generate("a circle", seed=-1), "^seed -1 is no whole number from 0"),
    (lambda: model.generate(["a", "b"], seed=[0, 2**32]), "^seed 4294967296 is no"),
    (lambda: model.generate("a circle", seed=1.5), "^seed 1.5 is no"),
    (lambda: model.generate(["a circle", ""]), "prompt 1: the prompt is empty"),
    (lambda: model.generate("a circle", num=0), "num is 0"),
    (lambda: model.generate("a circle", brightness=2), "setting 'brightness' is unknown; there are steps"),
    (lambda: model.generate("a circle", steps=0), "steps are 0"),
    (lambda: model.generate("a circle", decoder_steps=2000), "steps are 2 and 2000; take 1 to 1000"),
    (lambda: model.generate("a circle", steps=2.5), "steps is 2.5; give a whole number"),
    (lambda: model.generate("a circle", guidance="much"), "guidance is 'much'; give a number"),
    (lambda: model.generate("a circle", exact_times=1), "exact_times is 1; give true or false"),
    (lambda: model.generate("a circle", guidance_interval=["low", "high"]), "give two noise levels"),
    (lambda: model.generate("a circle", wording="poem"), "^wording 'poem' is unknown; choose one of release, paper"),
    (lambda: model.sampling_with(form="poem"), "^form 'poem' is unknown; choose one of inference, training"),
    (lambda: model.reconstruct(picture, brightness=2), "setting 'brightness' is unknown"),
    (lambda: model.reconstruct(picture, steps=5), "'steps' does not bear on a reconstruction; these do: decoder_steps"),
    (lambda: model.edit(picture, "bluer", num=3), "setting 'num' is unknown"),
    (lambda: model.reconstruct(tmp_path / "none.png"), "none.png: no such image"),
    (lambda: model.features(tmp_path / "broken.png"), "broken.png: not an image"),
    (lambda: model.features(tmp_path), "not a readable image"),
    (lambda: model.features(np.zeros((4, 4, 3))), r"a picture is float64 \[4, 4, 3\]; give uint8"),
    (lambda: model.chat("  "), "message 0 is empty"),
    (lambda: model.chat(ask("what is this?", tmp_path / "none.png")), "none.png: no such image"),
    (lambda: model.chat(ask("what is <image>?", picture)), "1 pictures but 2 <image>"),
    (lambda: model.chat("what?", max_new_tokens=0), "max_new_tokens is 0; take 1 to 32768"),
    (lambda: model.chat("what?", max_new_tokens=10**8), "max_new_tokens is 100000000; take 1 to 32768"),
    (lambda: model.chat("what?", temperature=float("nan")), "temperature nan"),
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


@pytest.mark.parametrize("backbone", ["qwen3_siglip", "llama"])
def test_other_backbones_answer(model, picture, backbone):
  """Qwen3 looks at pictures through SigLIP2, Llama sees none."""
  cfg = tiny.config(**tiny.BACKBONES[backbone])
  pictures = open_pictures(cfg, default_preprocessor(cfg))
  other = Model(Blip3o(cfg), tiny.params(0, backbone), model.tokenizer, pictures, model.sampling, name=backbone)
  text = templates.chat_prompt(model.tokenizer, [("user", "what is red?")])
  if pictures is None:
    with pytest.raises(UserError, match="llama takes requests without pictures only"):
      other.chat(ask("what is this?", picture))
    assert isinstance(other.chat("what is red?", max_new_tokens=4), str)
    assert other.prompts.to_answer("what is red?") == Row(text)
    return
  assert all(isinstance(said, str) for said in other.answer([picture, None], ["what?", "red?"], max_new_tokens=4))
  rows = [other.prompts.to_answer(ask(picture, "\nwhat?", picture)), other.prompts.to_answer("what is red?")]
  batch = other.prompts.batch(rows, draw=False)
  place = "[IMG]<image><image><image><image>[/IMG]"
  seen = templates.chat_prompt(model.tokenizer, [("user", f"{place}\nwhat?{place}")])
  assert [row[valid].tolist() for row, valid in zip(batch.tokens, batch.mask, strict=True)] == [seen, text]
  assert (batch.tokens == cfg.backbone.image_token).sum(axis=1).tolist() == [8, 0]
  square = np.asarray(picture.resize((8, 8), Image.Resampling.BILINEAR))
  assert set(batch.vision) == {"images"} and (batch.vision["images"][0] == square).all()
  assert (batch.positions == np.where(batch.mask, np.arange(batch.mask.shape[1]), 0)[:, None]).all()


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
  (small / "tokenizer").rmtree()
  assert blip3o_jax.load(small).tokenizer is None  # only a language model needs one
  mute = {"backbone": tiny.params()["backbone"]}
  with pytest.raises(UserError, match="no tokenizer"):
    blip3o_jax.load(model_dir.write(tmp_path / "mute", preset="micro", overrides=tiny.OVERRIDES, params=mute))
  model_dir.annotate(small, sampling={"sparkle": 1})
  with pytest.raises(UserError, match="setting 'sparkle' is unknown"):
    blip3o_jax.load(small)


def test_parts_divide_over_all_that_a_batch_is_cut_over(model):
  mesh = jax.sharding.AbstractMesh((2, 1, 2, 1), AXES)
  sliced = Model(model.model, model.params, model.tokenizer, model.pictures, model.sampling, mesh=mesh)
  assert list(sliced.batches([1, 2, 3, 4, 5], 2)) == [([1, 2, 3, 4], 4), ([5] * 4, 1)]
  assert list(sliced.batches([1], 8)) == [([1] * 4, 1)]
  assert [sliced.rounded(size) for size in (1, 4, 6)] == [4, 4, 8] and model.rounded(3) == 3
  assert list(model.batches([1, 2, 3], 2)) == [([1, 2], 2), ([3, 3], 1)]
