"""`blip3o chat`: turns from the command line, or line by line from standard input."""

import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from blip3o_jax.data.outputs import encode_png, write_atomically
from blip3o_jax.errors import UserError
from blip3o_jax.inference.dialogue import Dialogue
from blip3o_jax.inference.model import Model

HELP = """a line is a turn; /image FILE shows a picture with the next one; /draw TEXT draws; /quit ends"""


def chat(
  model: Model, turns: Sequence[str] | None, images: Sequence[Path], out: Path, *, seed: int = 0, **settings
) -> None:
  """Print the answers as they come.

  Args:
    turns: None: lines of standard input until it ends, where a mistake is told and the talk goes on.
    images: shown with the first turn. out: folder of what `/draw` draws. seed: of answers and pictures.
    settings: of Model.chat.
  """
  talk, shown = Dialogue(model), list(images)
  for line in _lines() if turns is None else turns:
    try:
      _turn(talk, line, shown, out, seed, settings)
    except UserError as error:
      if turns is not None:
        raise
      print(f"blip3o: {error}", flush=True)


def _turn(talk: Dialogue, line: str, shown: list[Path], out: Path, seed: int, settings: dict) -> None:
  word, _, rest = line.partition(" ")
  if word == "/help":
    return print(HELP)
  if word == "/image":
    return shown.append(Path(rest.strip()))
  images = shown.copy()
  shown.clear()  # a picture that cannot be read is not tried again
  if word == "/draw":
    picture = talk.draw(rest, images, seed=seed)
    path = next(path for n in itertools.count() if not (path := out / f"drawn-{n}.png").exists())  # of other talks too
    write_atomically(path, encode_png(picture))
    return print(path, flush=True)
  for piece in talk.say(line, images, seed=seed, **settings):
    print(piece, end="", flush=True)
  print(flush=True)


def _lines() -> Iterable[str]:
  if sys.stdin.isatty():
    print(HELP)
  while True:
    if sys.stdin.isatty():
      print("> ", end="", flush=True)
    line = sys.stdin.readline()
    if not line or line.strip() == "/quit":
      return
    if line.strip():
      yield line.strip()
