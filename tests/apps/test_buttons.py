"""What the buttons of the page do: real pictures and answers of the tiny model, and one line for what is wrong."""

import jax
import numpy as np
import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax.apps import buttons as page_buttons
from blip3o_jax.apps.buttons import Buttons

DRAWING = {"seed": 3, "guidance": 3.0, "steps": 2}


@pytest.fixture(scope="module")
def model(tiny_directory):
  return blip3o_jax.load(tiny_directory)


@pytest.fixture
def buttons(model, tmp_path):
  return Buttons(model, tmp_path)


@pytest.fixture
def upload(tmp_path):
  """A file as Gradio lays uploads down: each in a folder of its own."""

  def lay(name, content=None):
    path = tmp_path / "0a1b2c" / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
      Image.new("RGB", (16, 16), "purple").save(path)
    else:
      path.write_bytes(content)
    return str(path)

  return lay


def told(said):
  """The last status."""
  return [news["status"] for news in said if "status" in news][-1]


def test_draw_shows_each_picture_when_it_is_done(buttons, model):
  said = list(buttons.draw("A circle!", num=2, **DRAWING))
  assert [len(news["gallery"]) for news in said] == [0, 1, 2]
  assert [news["status"].count("<progress") for news in said] == [1, 1, 0]
  assert "picture 2 of 2" in said[1]["status"] and 'value="0.500"' in said[1]["status"]
  assert "2 pictures of seed 3 · " in said[2]["status"]
  first, second = (Image.open(file) for file in said[-1]["gallery"])
  # The same picture as from Python, under a name and with facts that say what it is.
  assert np.array_equal(np.asarray(first), model.generate("A circle!", **DRAWING)[0][0])
  assert not np.array_equal(np.asarray(first), np.asarray(second))
  assert first.filename.endswith("/a-circle-1.png") and second.text["number"] == "1" and second.text["seed"] == "3"


def test_draw_takes_as_many_at_once_as_there_are_devices(buttons, model, monkeypatch):
  """The last batch filled up. tests/inference/test_exact.py draws on four for real."""
  asked = []

  def draw(self, rows, seeds, numbers, sampling):
    asked.append((len(rows), seeds, numbers))
    return np.stack([np.full((4, 4, 3), n, np.uint8) for n in numbers])

  monkeypatch.setattr(type(model), "draw", draw)
  monkeypatch.setattr(model, "mesh", jax.sharding.AbstractMesh((2,), ("data",)))
  said = list(buttons.draw("A circle!", num=3, **DRAWING))
  assert asked == [(2, [3, 3], [0, 1]), (2, [3, 3], [2, 2])]
  assert [len(news["gallery"]) for news in said] == [0, 2, 3] and "picture 3 of 3" in said[1]["status"]
  assert [np.asarray(Image.open(file)).max() for file in said[-1]["gallery"]] == [0, 1, 2]


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({"prompt": "  "}, "the prompt is empty"),
    ({"prompt": "circle " * 10_000}, "tokens, 4096 are the most"),
    ({"num": 0}, "number of pictures is 0; take 1 to 16"),
    ({"num": None}, "number of pictures is missing"),
    ({"seed": None}, "the seed is missing; give a whole number"),
    ({"seed": -1}, "seed -1 is no whole number from 0"),
    ({"seed": 10**20}, "is no whole number from 0"),
    ({"steps": -3}, "steps are -3"),
    ({"steps": 2.5}, "number of steps is 2.5"),
    ({"guidance": None}, "the guidance is missing"),
    ({"guidance": 1e9}, "guidance is 1000000000.0; take 0 to 100"),
    ({"guidance": float("nan")}, "guidance is nan"),
  ],
)
def test_what_cannot_be_drawn_is_one_line(buttons, changes, line):
  asked = {"prompt": "a circle", "num": 1, **DRAWING, **changes}
  said = list(buttons.spoken(lambda: buttons.draw(**asked)))
  assert line in said[-1]["status"] and 'role="alert"' in said[-1]["status"] and said[-1]["status"].count("\n") == 0
  assert not any(news.get("gallery") for news in said)


def test_edit_and_reconstruct_want_a_picture(buttons, upload):
  file = upload("mine.png")
  for work, line in (
    (lambda: buttons.edit(None, "a circle", **DRAWING), "there is no picture; choose one first"),
    (lambda: buttons.edit(file, " ", **DRAWING), "the instruction is empty"),
    (lambda: buttons.edit(file, "a circle", 0, 3.0, -1), "steps are -1"),
    (lambda: buttons.reconstruct(None, seed=0), "there is no picture"),
    (lambda: buttons.reconstruct(file, seed=None), "the seed is missing"),
  ):
    assert line in told(buttons.spoken(work))


def test_reconstruct(buttons, model, upload):
  file = upload("mine.png")
  *_, again = buttons.reconstruct(file, seed=3)
  assert again["edited"].endswith("/mine-1.png") and "Done" in again["status"]
  assert np.array_equal(np.asarray(Image.open(again["edited"])), model.reconstruct(file, seed=3)[0])


def test_uploads_that_are_no_pictures_are_called_by_their_own_names(buttons, upload):
  said = told(buttons.spoken(buttons.reconstruct, upload("my notes.txt", b"hello"), 0))
  assert ">my notes.txt: not an image that Pillow knows<" in said
  huge = upload("huge.png")
  Image.new("1", (20_000, 20_000)).save(huge)
  said = told(buttons.spoken(buttons.edit, huge, "a circle", *DRAWING.values()))
  assert ">huge.png: more than 89 million pixels; shrink it first<" in said


def test_a_dialogue_of_words_and_pictures(buttons, model, upload):
  *_, first = buttons.draw_next({"text": "a circle", "files": []}, None, **DRAWING)
  drawn = np.asarray(Image.open(first["chat"][-1]["content"]["path"]))
  assert np.array_equal(drawn, model.generate("a circle", **DRAWING)[0][0])
  file = upload("mine.png")
  *_, second = buttons.say({"text": "are they alike?", "files": [file]}, first["talk"])
  assert [bubble["role"] for bubble in second["chat"]] == ["user", "assistant", "user", "user", "assistant"]
  assert [bubble["content"] for bubble in second["chat"][2:4]] == [{"path": file}, "are they alike?"]
  # What it drew and what was shown are what it reads.
  *asked, answer = second["talk"]["messages"]
  assert [message["role"] for message in asked] == ["user", "assistant", "user"]
  assert np.array_equal(asked[1]["content"][0], drawn) and answer["content"] == model.chat(asked, max_new_tokens=1024)
  assert second["chat"][-1]["content"] == (answer["content"] or "(no words)")
  # The box is emptied once the turn is taken, and not if it was refused.
  for work, settings in ((buttons.say, ()), (buttons.draw_next, DRAWING.values())):
    said = list(buttons.spoken(work, {"text": " ", "files": []}, second["talk"], *settings))
    assert "the message is empty" in told(said) and not any("asked" in news for news in said)


def test_answers_stream(buttons, monkeypatch, model):
  monkeypatch.setattr(type(model), "chat", lambda self, messages, stream, max_new_tokens: iter(["a", " circle", ""]))
  said = list(buttons.say({"text": "what is it?", "files": []}, None))
  assert [news["chat"][1:] for news in said] == [[]] + [
    [{"role": "assistant", "content": words}] for words in ("a", "a circle", "a circle", "a circle")
  ]
  assert said[0]["asked"] is None and "talk" not in said[2] and "Answered" in said[-1]["status"]


def test_a_bug_is_told_and_printed(buttons, capsys):
  def broken():
    yield {"status": page_buttons.working("Drawing")}
    raise ZeroDivisionError("by <zero>")

  assert "ZeroDivisionError: a fault of this program" in told(buttons.spoken(broken))
  assert "ZeroDivisionError: by <zero>" in capsys.readouterr().err

  def large():
    yield {"status": page_buttons.working("Drawing")}
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")

  assert "the device has no memory left" in told(buttons.spoken(large))


def test_what_users_write_is_not_taken_for_html():
  assert "<b>" not in page_buttons.failed("<b>") and "<b>" not in page_buttons.working("<b>")
  assert page_buttons.failed("two\n lines").count("two lines") == 1
