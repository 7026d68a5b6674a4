"""`eval shapes`: arithmetic of the score, the control, and what is left on disk. Pictures are rendered, not drawn."""

import dataclasses
import json
import random

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.data import shapes
from blip3o_jax.errors import UserError
from blip3o_jax.evaluation import shapes as evaluation


def true_picture(caption, rng):
  """A picture that shows what `caption` claims: the first scene for its family that does."""
  while True:
    scene = shapes.sample_scene(rng, caption.family)
    things = list(scene.things)
    if caption.family == "counting" and len(things) != len(caption.things):
      continue
    recoloured = tuple(
      dataclasses.replace(t, shape=shape, colour=colour or t.colour)
      for t, (shape, colour) in zip(things, caption.things, strict=True)
    )
    if caption.relation and not shapes.relation_of(*recoloured) == caption.relation:
      continue
    return shapes.render(shapes.Scene(caption.ground or scene.ground, recoloured))


class Painter:
  """Draws what is asked for when `honest`, else the same picture always; answers "red"."""

  def __init__(self, honest=True):
    self.honest = honest

  def generate(self, prompts, *, num=1, seed=0):
    rng = random.Random(seed)
    captions = {caption.text: caption for caption in evaluation.prompts()}
    fixed = shapes.render(shapes.sample_scene(rng, "single_object"))
    return [[true_picture(captions[p], rng) if self.honest else fixed for _ in range(num)] for p in prompts]

  def answer(self, images, questions):
    assert all(image.shape == (64, 64, 3) for image in images)
    return ["Red." for _ in questions]


@pytest.fixture(scope="module")
def captions():
  return evaluation.prompts(limit=18)


def test_limit_takes_from_the_families_in_turn(captions):
  assert [sum(c.family == family for c in captions) for family in shapes.FAMILIES] == [3] * 6
  assert [c.family for c in captions] == sorted((c.family for c in captions), key=shapes.FAMILIES.index)


def test_true_pictures_score_one_and_the_control_little(captions, tmp_path):
  score = evaluation.evaluate(Painter(), captions, tmp_path, num=2)
  assert score.overall == pytest.approx(1.0) and score.pictures == 36
  assert score.control < 0.35
  assert set(score.families) == set(score.control_families) == set(shapes.FAMILIES)
  assert evaluation.evaluate(Painter(), captions, tmp_path, num=2) == score  # deterministic
  assert evaluation.read_score(tmp_path / "scores.json") == score


def test_a_painter_that_does_not_listen_scores_what_the_control_scores(captions, tmp_path):
  score = evaluation.evaluate(Painter(honest=False), captions, tmp_path, num=1)
  assert score.overall < 0.3


def test_what_is_left_on_disk(captions, tmp_path):
  evaluation.evaluate(Painter(), captions[:4], tmp_path, num=1)
  (tmp_path / "pictures" / ".000-0.png.0a1b2c3d.tmp").write_bytes(b"of a killed one")
  theirs = ["2024-01-holiday.png", "999-0.jpg", "cat.png"]
  for name in theirs:
    (tmp_path / "pictures" / name).write_bytes(b"of the user")
  evaluation.evaluate(Painter(), captions[:3], tmp_path, num=2)
  stored = json.loads((tmp_path / "scores.json").read_text())
  assert [row["prompt"] for row in stored["prompts"]] == [c.text for c in captions[:3]]
  assert stored["prompts"][0]["right"] == [True, True]
  own = [".eval-shapes", *(f"{i:03}-{n}.png" for i in range(3) for n in (0, 1))]
  assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == sorted(own + theirs)
  with Image.open(tmp_path / "grid.png") as sheet:
    assert sheet.size[0] > 2 * 128 * 3 and sheet.size[1] > 128
  assert not list(tmp_path.rglob("*.tmp"))


def test_pictures_of_another_command_are_left_alone(captions, tmp_path):
  """Those of `generate` have the same names. Nothing is drawn."""
  (tmp_path / "pictures").mkdir()
  (tmp_path / "pictures" / "000-0.png").write_bytes(b"of generate")
  with pytest.raises(UserError, match="pictures holds pictures of another command"):
    evaluation.evaluate(None, captions[:1], tmp_path)
  assert (tmp_path / "pictures" / "000-0.png").read_bytes() == b"of generate"


def test_overall_is_the_mean_of_family_means_and_the_error_counts_prompts(monkeypatch):
  """Two families of 3 and 1 prompts; verdicts are given, so the numbers are worked out by hand."""
  family = lambda name, n: [shapes.Caption(name, (("circle", colour),)) for colour in list(shapes.COLOURS)[:n]]
  captions = [*family("colors", 3), *family("single_object", 1)]
  drawn = [[1, 1], [1, 0], [0, 0], [1, 1]]  # "pictures" that carry their own verdict
  monkeypatch.setattr(evaluation, "judge", lambda picture: picture)
  monkeypatch.setattr(evaluation, "satisfies", lambda seen, spec: seen)
  score, verdicts = evaluation.score(captions, drawn)
  assert verdicts == [[True, True], [True, False], [False, False], [True, True]]
  assert score.families == {"single_object": 1.0, "colors": 0.5}
  assert score.overall == pytest.approx(0.75)
  # Prompt means 1, 1/2, 0: variance 1/4, over 3 prompts 1/12; one prompt has none; two families.
  assert score.standard_error == pytest.approx(np.sqrt(1 / 12) / 2)


def test_control_partner_claims_something_else_of_the_same_family():
  captions = evaluation.prompts()
  for i, j in enumerate(evaluation.control_partners(captions)):
    assert captions[i].family == captions[j].family
    assert evaluation._claim(captions[i]) != evaluation._claim(captions[j])
  left = shapes.Caption("position", (("circle", None), ("square", None)), "left of")
  right = shapes.Caption("position", (("square", None), ("circle", None)), "right of")
  assert evaluation.control_partners([left, right]) == [None, None]  # the same claim turned round
  assert evaluation.control_partners([left, dataclasses.replace(right, relation="below")]) == [1, 0]


def test_questions_are_scored_by_kind(tmp_path, captions):
  Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
  asked = [("what colour is the circle?", "red"), ("what colour is the cross?", "blue"), ("is there a circle?", "yes")]
  rows = [
    {"image": "a.png", "conversations": [{"from": "human", "value": f"<image>\n{q}"}, {"from": "gpt", "value": a}]}
    for q, a in asked
  ]
  (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  score = evaluation.evaluate(Painter(), captions[:1], tmp_path / "out", num=1, questions_dir=tmp_path)
  assert score.understanding == {"heldout": {"overall": pytest.approx(1 / 3), "colour": 0.5, "presence": 0.0}}


def test_what_a_question_asks_for():
  asked = {
    "what colour is the background?": "background",
    "where is the cross?": "place",
    "is the cross above x?": "relation",
  }
  assert {question: evaluation.kind_of(question) for question in asked} == asked


def test_bad_input_is_told(tmp_path):
  with pytest.raises(UserError, match="split"):
    evaluation.run("micro", tmp_path, split="trained")
  (tmp_path / "heldout.jsonl").touch()
  for folder in (tmp_path / "none", tmp_path):
    with pytest.raises(UserError, match="make-shapes"):  # before anything is drawn
      evaluation.evaluate(None, evaluation.prompts(limit=1), tmp_path / "out", questions_dir=folder)
  for line, words in (("{", "JSONDecodeError"), ('{"image": null}', "KeyError"), ("[]", "TypeError")):
    (tmp_path / "heldout.jsonl").write_text(line)
    with pytest.raises(UserError, match=f"heldout.jsonl: line 1 is no question .{words}"):
      evaluation.read_heldout(tmp_path)
  (tmp_path / "broken.png").write_bytes(b"no picture")
  row = {"image": "broken.png", "conversations": [{"value": "<image>\nwhat?"}, {"value": "red"}]}
  (tmp_path / "heldout.jsonl").write_text(json.dumps(row))
  with pytest.raises(UserError, match=r"broken.png: not an image"):
    evaluation.read_heldout(tmp_path)
