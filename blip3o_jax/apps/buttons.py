"""What the buttons of the web page do, and the line that says how they fare. Knows nothing of Gradio."""

import html
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_jax.data.outputs import encode_png, write_atomically
from blip3o_jax.errors import UserError, out_of_memory
from blip3o_jax.inference.dialogue import Dialogue
from blip3o_jax.inference.model import Model
from blip3o_jax.jobs.generate import picture_facts
from blip3o_jax.sharding.distributed import whole

MOST_PICTURES = 16  # of one request, which holds up the others
Field = float | None  # a number on the page, or None where it was left empty
Said = Iterator[dict[str, Any]]  # {part of the page: its new value}, again and again while the work goes on


class Buttons:
  """Each method is a button and yields {part of the page: its new value} as it goes on.

  Parts: "gallery" files; "edited" a file; "chat" bubbles {"role", "content"}; "talk" what the next turn needs; "asked"
  the box of the dialogue; "status" HTML. Pictures come as files.

  All raise UserError for what cannot be done; `spoken` makes a line of it.
  """

  def __init__(self, model: Model, folder: Path):
    """`folder`: gets the pictures that are drawn; uploads may lie there too."""
    self.model, self.folder = model, folder
    self._count = 0

  def draw(self, prompt: str, num: Field, seed: Field, guidance: Field, steps: Field) -> Said:
    """Pictures of a caption, as many at once as the mesh has places: one compiled program serves any number, and each
    is shown when it is done."""
    num, settings = _whole("number of pictures", num), _settings(seed, guidance, steps)
    if not 1 <= num <= MOST_PICTURES:
      raise UserError(f"the number of pictures is {num}; take 1 to {MOST_PICTURES}")
    seed, sampling = settings.pop("seed"), self.model.sampling_with(**settings)
    row = self.model.row_to_draw(prompt, sampling)
    start, files = time.perf_counter(), []
    for part, real in self.model.batches(list(range(num)), 1):
      yield {"gallery": files.copy(), "status": working(f"Drawing picture {part[0] + 1} of {num}", part[0] / num)}
      drawn = whole(self.model.draw([row] * len(part), [seed] * len(part), part, sampling))
      for n, picture in zip(part[:real], drawn, strict=False):
        files.append(self._file(picture, prompt, picture_facts(prompt, seed, n, sampling, self.model.name)))
    drawn = "1 picture" if num == 1 else f"{num} pictures"
    yield {"gallery": files, "status": finished(f"{drawn} of seed {seed}", start)}

  def edit(self, picture: str | None, instruction: str, seed: Field, guidance: Field, steps: Field) -> Said:
    """A picture drawn anew by an instruction."""
    if not instruction.strip():
      raise UserError("the instruction is empty; say what to change, or press Reconstruct")
    settings = _settings(seed, guidance, steps)
    yield from self._anew(picture, "Drawing it anew", lambda: self.model.edit(picture, instruction, **settings))

  def reconstruct(self, picture: str | None, seed: Field) -> Said:
    """A picture drawn again from its CLIP features."""
    seed = _whole("seed", seed)
    yield from self._anew(picture, "Reconstructing", lambda: self.model.reconstruct(picture, seed=seed))

  def say(self, asked: Mapping[str, Any], talk: Mapping | None) -> Said:
    """An answer in words, as they come; `asked`: {"text": ..., "files": [...]}."""
    dialogue, chat = self._turn(asked, talk)
    start, said = time.perf_counter(), ""
    pieces = dialogue.say(asked["text"], asked["files"])
    yield {"chat": chat, "asked": None, "status": working("Reading")}
    for piece in pieces:
      said += piece
      if said:
        yield {"chat": [*chat, _bubble("assistant", said)], "status": working("Answering")}
    chat = [*chat, _bubble("assistant", said or "(no words)")]
    yield {"chat": chat, "talk": _talk(dialogue, chat), "status": finished("Answered", start)}

  def draw_next(
    self, asked: Mapping[str, Any], talk: Mapping | None, seed: Field, guidance: Field, steps: Field
  ) -> Said:
    """A picture in the light of the dialogue so far."""
    dialogue, chat = self._turn(asked, talk)
    start, settings = time.perf_counter(), _settings(seed, guidance, steps)
    yield {"status": working("Drawing")}
    picture = dialogue.draw(asked["text"], asked["files"], **settings)
    chat = [*chat, _bubble("assistant", {"path": self._file(picture, asked["text"])})]
    yield {"chat": chat, "asked": None, "talk": _talk(dialogue, chat), "status": finished("Drawn", start)}

  def spoken(self, work: Callable[..., Said], *inputs) -> Said:
    """`work(*inputs)`, but what goes wrong becomes the status, in one line."""
    try:
      yield from work(*inputs)
    except UserError as error:
      # Of an upload, the name that the user gave it: Gradio keeps each in a folder of its own.
      yield {"status": failed(re.sub(rf"{re.escape(str(self.folder))}/\w+/", "", str(error)))}
    except Exception as error:  # told here and there, and the server goes on
      traceback.print_exc()
      bug = f"{type(error).__name__}: a fault of this program; its terminal says more"
      yield {"status": failed(out_of_memory(error) or bug)}

  def _anew(self, picture: str | None, doing: str, work: Callable[[], Sequence[np.ndarray]]) -> Said:
    if not picture:
      raise UserError("there is no picture; choose one first")
    start = time.perf_counter()
    yield {"edited": None, "status": working(doing)}
    yield {"edited": self._file(work()[0], Path(picture).stem), "status": finished("Done", start)}

  def _turn(self, asked: Mapping[str, Any], talk: Mapping | None) -> tuple[Dialogue, list[dict]]:
    """The dialogue so far, and its bubbles with the new turn of the user."""
    if not asked["text"].strip():
      raise UserError("the message is empty; say something")
    dialogue, chat = Dialogue(self.model), []
    if talk:
      dialogue.messages, chat = talk["messages"], talk["chat"]
    return dialogue, [*chat, *(_bubble("user", {"path": f}) for f in asked["files"]), _bubble("user", asked["text"])]

  def _file(self, picture: np.ndarray, words: str, facts: Mapping[str, str] | None = None) -> str:
    """The picture as a file, named after `words`: that is what a download is called."""
    self._count += 1
    stem = re.sub(r"\W+", "-", words.lower())[:60].strip("-")
    path = self.folder / "drawn" / f"{stem}-{self._count}.png"
    write_atomically(path, encode_png(picture, facts))
    return str(path)


def _bubble(role: str, content: str | dict) -> dict:
  return {"role": role, "content": content}


def _talk(dialogue: Dialogue, chat: list[dict]) -> dict:
  return {"messages": dialogue.messages, "chat": chat}


def _settings(seed: Field, guidance: Field, steps: Field) -> dict:
  if guidance is None:
    raise UserError("the guidance is missing; give a number, 3 is usual")
  return {"seed": _whole("seed", seed), "guidance": guidance, "steps": _whole("number of steps", steps)}


def _whole(what: str, value: Field) -> int:
  if value is None or value != int(value):
    raise UserError(f"the {what} is {'missing' if value is None else value}; give a whole number")
  return int(value)


# ---- the line that says how things stand


def working(text: str, share: float | None = None) -> str:
  """HTML of a progress bar, filled to a share of 0..1; without one it only moves."""
  value = "" if share is None else f' value="{share:.3f}"'
  return _line(f"<progress{value}></progress><span>{html.escape(text)}</span>")


def finished(text: str, start: float) -> str:
  """HTML of what was done, and how long it took since `start`."""
  return _line(f"<span>{html.escape(text)} · {time.perf_counter() - start:.1f} s</span>")


def failed(text: str) -> str:
  """HTML of what is wrong."""
  return _line(f"<span>{html.escape(' '.join(text.split()))}</span>", "wrong")


def _line(inside: str, kind: str = "") -> str:
  role = "alert" if kind else "status"
  return f'<div class="line {kind}" role="{role}">{inside}</div>'
