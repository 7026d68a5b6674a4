"""The page: it has what it should, asks the network for nothing, and trusts no text."""

import base64
import html.parser
import io
import re

import numpy as np
from PIL import Image

from blip3o_jax.apps import report
from blip3o_jax.apps.plots import Curve
from blip3o_jax.evaluation.shapes import FAMILIES, ShapesScore

RED = np.full((64, 64, 3), (220, 40, 40), np.uint8)
BLUE = np.full((64, 64, 3), (50, 80, 220), np.uint8)


def full_report():
  families = {family: n / 8 for n, family in enumerate(FAMILIES, 1)}
  score = ShapesScore(0.4375, 0.02, families, 0.0625, dict.fromkeys(FAMILIES, 0.0625), 96)
  return report.Report(
    title="A model that draws",
    summary="It <b>learned</b>.",
    facts=[("44 %", "right")],
    scores={"this run": score, "micro": score},
    drawings=[report.Drawing("a red circle", [RED, BLUE], [True, False], "colors")],
    seeds=[report.Drawing("a cross", [RED]), report.Drawing("a cross", [BLUE])],
    reconstructions=[(RED, BLUE)],
    answers=[report.Answer(RED, "what colour is it?", "red.", "red"), report.Answer(BLUE, "how many?", "one", "two")],
    curves=[Curve("generation", (1, 2, 3), (3.0, 2.0, 1.0)), Curve("instruct", (1,), (1.0,))],
    steps=[("corpus", "pictures", 3.0), ("generation", "training", 61.0)],
    commands=[("Draw", 'blip3o generate --prompt "a < b"')],
    machine={"Python": "3.11"},
  )


class Page(html.parser.HTMLParser):
  """Open tags must close in order; text and sources are collected."""

  void = frozenset({"meta", "link", "img", "line", "path", "circle", "br"})

  def __init__(self, text):
    super().__init__()
    self.stack, self.words, self.sources = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.sources += [value for key, value in attrs if key in ("src", "href")]
    if tag not in self.void:
      self.stack.append(tag)

  def handle_startendtag(self, tag, attrs):
    pass

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def test_page_has_every_part_and_asks_for_nothing(tmp_path):
  report.write(tmp_path / "report.html", full_report())
  text = (tmp_path / "report.html").read_text()
  page = Page(text)
  assert page.stack == []
  words = " ".join(page.words)
  parts = ["A model that draws", "Score", "44 % ± 2", "a red circle", "seed 1", "what colour is it?", "it is two"]
  parts += ["generation", "training step", "1 min 04 s", 'blip3o generate --prompt "a < b"', "3.11"]
  for expected in parts:
    assert expected in words, expected
  assert all(source.startswith("data:") for source in page.sources)
  assert not re.search(r"https?:|@import|url\(", text)
  assert "It <b>learned</b>." in words  # told as text, not as markup
  assert not list(tmp_path.glob(".*"))


def test_pictures_are_in_the_page_exactly():
  found = re.findall(r"data:image/png;base64,([^\"]+)", report.render(full_report()))
  pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]
  assert len(pictures) == 2 + 2 + 2 + 2
  assert (pictures[0] == RED).all() and (pictures[1] == BLUE).all()


def test_verdicts_and_answers_are_marked():
  text = report.render(full_report())
  assert text.count('<em class="right"') == text.count('<em class="wrong"') == 1
  assert '<p class="said right">red.</p>' in text and '<p class="said wrong">one</p>' in text


def test_empty_parts_have_no_section():
  text = report.render(report.Report(title="Nothing yet", summary=""))
  assert "<section>" not in text and "Nothing yet" in text


def test_clock():
  assert [report.clock(s) for s in (0.42, 42, 59.7, 552, 3900)] == [
    "0.4 s",
    "42 s",
    "1 min 00 s",
    "9 min 12 s",
    "1 h 05 min",
  ]
