"""Talks of several turns over the tiny model: streams, batches, memory, and pictures that come back as context."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax.apps.chat import chat
from blip3o_jax.data import templates
from blip3o_jax.errors import UserError
from blip3o_jax.inference.dialogue import Dialogue
from blip3o_jax.inference.prompts import edit_request

RED, GRAY = Image.new("RGB", (24, 24), (200, 30, 20)), Image.new("RGB", (24, 24), (128, 128, 128))


@pytest.fixture(scope="module")
def model(tiny_directory):
  loaded = blip3o_jax.load(tiny_directory)
  loaded.batch_size = 2
  pictures = loaded.prompts.pictures
  small = dataclasses.replace(pictures.processor, min_pixels=256, max_pixels=1024)
  loaded.prompts.pictures = dataclasses.replace(pictures, processor=small)
  return loaded


def turn(*content, role="user"):
  return {"role": role, "content": list(content)}


def near(a, b):
  return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_a_batch_answers_each_as_alone_and_in_pieces(model):
  """Dialogues of other lengths, with several pictures or none: one by one, together, streamed, all the same words."""
  talks = [
    [turn(RED, "what is it?"), turn("red", role="assistant"), turn("and ", GRAY, " this?")],
    "is red a colour?",
    [turn("what is red?")],
  ]
  settings = {"max_new_tokens": 5}
  alone = [model.chat(talk, **settings) for talk in talks]
  assert all(isinstance(words, str) and words for words in alone) and len(set(alone)) == 3
  assert model.chat(talks, **settings) == alone
  pieces = list(model.chat(talks, stream=True, **settings))
  assert len(pieces) > 1 and ["".join(row) for row in zip(*pieces, strict=True)] == alone
  assert "".join(model.chat(talks[0], stream=True, **settings)) == alone[0]
  turned = [turn(GRAY, "what is it?"), *talks[0][1:]]
  assert model.chat(turned, **settings) != alone[0]  # the picture of an earlier turn is read


def test_sampling_is_by_seed_and_row(model):
  settings = {"max_new_tokens": 5, "temperature": 1.5, "top_p": 0.9, "top_k": 50}
  talk = "what is red?"
  first, second = model.chat([talk, talk], **settings)
  assert first != second  # row i draws from (seed, i)
  assert model.chat(talk, **settings) == first == "".join(model.chat(talk, stream=True, **settings))
  assert model.chat(talk, seed=1, **settings) != first
  assert model.chat(talk, max_new_tokens=5, temperature=1.5, top_k=1) == model.chat(talk, max_new_tokens=5)


def test_edit(model):
  """The picture goes through the understanding tower, the instruction stands where the release reconstructs."""
  red, gray = model.edit([RED, GRAY], "make it blue", seed=5)  # always two at a time: one program serves
  assert red.shape == (16, 16, 3) and not near(red, gray)
  turned = model.edit([GRAY, RED], ["make it blue", "make it green"], seed=5)
  assert near(turned[0], gray) and not near(turned[1], red)
  mixed = model.generate(["a red circle", edit_request(RED, "make it blue")], seed=5)
  assert near(mixed[0][0], model.generate(["a red circle", "two circles"], seed=5)[0][0]) and near(mixed[1][0], red)
  assert edit_request(RED)[0]["content"][1] == templates.RECONSTRUCT.removeprefix("<image>")
  with pytest.raises(UserError, match="2 pictures for 1 instructions"):
    model.edit([RED, GRAY], ["blue"])


def test_a_drawn_picture_is_read_by_the_next_turn(model):
  talk = Dialogue(model)
  answer = "".join(talk.say("what is red?", max_new_tokens=5))
  assert answer == model.chat("what is red?", max_new_tokens=5)
  drawn = talk.draw("a red circle", seed=2)
  asked = [turn("what is red?"), turn(answer, role="assistant"), turn(templates.worded("a red circle"))]
  np.testing.assert_array_equal(drawn, model.generate([asked], seed=2)[0][0])
  after = "".join(talk.say("what is it?", max_new_tokens=5))
  context = [*asked, turn(drawn, role="assistant"), turn("what is it?")]
  assert after == model.chat(context, max_new_tokens=5)
  ((patches, _),) = model.prompts.to_answer(context).pictures
  np.testing.assert_array_equal(patches, model.prompts.pictures.read(drawn)[0])  # what the understanding tower is given
  assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 3


def test_answers_may_be_as_long_as_on_the_page_of_the_release(model, monkeypatch):
  asked, real = [], type(model).talk_settings
  monkeypatch.setattr(type(model), "talk_settings", lambda self, **s: asked.append(s) or real(self, **s))
  next(Dialogue(model).say("what is red?"))
  chat(model, ["what is red?"], [], "", max_new_tokens=5, temperature=1.5, seed=3)
  assert [settings["max_new_tokens"] for settings in asked] == [1024, 5]


def test_what_fails_is_not_remembered(model):
  talk = Dialogue(model)
  with pytest.raises(UserError, match="no such image"):
    talk.say("what is it?", ["nowhere.png"])
  with pytest.raises(UserError, match="is empty"):
    talk.say(" ")
  assert talk.messages == []


def test_the_commands_turns(model, tmp_path, monkeypatch, capsys):
  """Turns of the command line, then lines of standard input, where a mistake is told and the talk goes on."""
  RED.save(tmp_path / "red.png")
  chat(model, ["what is it?", "and now?"], [tmp_path / "red.png"], tmp_path, max_new_tokens=5)
  first, second = capsys.readouterr().out.splitlines()
  asked = [turn(RED, "what is it?")]
  assert first == model.chat([asked], max_new_tokens=5)[0]
  assert second == model.chat([[*asked, turn(first, role="assistant"), turn("and now?")]], max_new_tokens=5)[0]
  lines = ["/image nowhere.png", "what?", f"/image {tmp_path / 'red.png'}", "what is it?", "/draw a circle", "/help"]
  monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "/quit", "never"])))
  chat(model, None, [], tmp_path / "out", max_new_tokens=5)
  said = capsys.readouterr().out.splitlines()
  assert "no such image" in said[0] and said[1] == first and said[2] == str(tmp_path / "out" / "drawn-0.png")
  assert "/draw TEXT draws" in said[3] and len(said) == 4
  assert Image.open(said[2]).size == (16, 16)
  # Another talk takes another name, and another seed draws another picture.
  chat(model, ["/draw a circle"], [], tmp_path / "out", seed=1)
  assert capsys.readouterr().out == f"{tmp_path / 'out' / 'drawn-1.png'}\n"
  other = np.asarray(Image.open(tmp_path / "out" / "drawn-1.png"))
  assert near(other, model.generate("a circle", seed=1)[0][0]) and not near(other, Image.open(said[2]))
  with pytest.raises(UserError, match="no such image"):
    chat(model, ["what?"], [tmp_path / "nowhere.png"], tmp_path)
