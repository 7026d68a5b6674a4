"""What a user asks, made ready on the host: messages and pictures in, padded arrays out.

A request is a text or a dialogue: a list of messages {"role": "user", "content": ...}, as most chat libraries write
them. Content is a text, a picture, or a list of both in their order; {"type": "text", "text": ...} and
{"type": "image", "image": ...} are understood too. Roles are "user", "assistant" and, for the first message, "system".
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.data import templates, transforms
from blip3o_jax.data.pictures import Pictures
from blip3o_jax.data.tokenizer import Tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.models.blip3o import BACKBONES, Blip3oConfig

Picture = Image.Image | np.ndarray | str | os.PathLike
Message = Mapping[str, Any]
Dialogue = Sequence[Message]
ROLES = ("system", "user", "assistant")
LONGEST = 32768  # tokens of a dialogue: the context that Qwen2.5-VL was trained with
LONGEST_TO_DRAW = 4096  # of a request for a picture; the release trained with at most 448 (spec 4.2)


@dataclasses.dataclass(frozen=True)
class Row:
  """One request: its tokens, and its pictures as the language model takes them (data.pictures)."""

  tokens: list[int]
  pictures: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class Batch:
  """tokens int32, mask bool [B, L], padded on the right; positions int32 [B, 3, L]; vision: the backbone's
  `image_keys`, nothing where no row has a picture."""

  tokens: np.ndarray
  mask: np.ndarray
  positions: np.ndarray
  vision: Mapping[str, np.ndarray]


def bucket(length: int) -> int:
  """What `length` is padded to, so that few programs serve all: steps of 16, above 128 of an eighth to a quarter."""
  step = max(16, 1 << (length - 1).bit_length() >> 3)
  return -(-length // step) * step


def shown(picture: Picture) -> Message:
  """A picture as part of a message; bare, a path in a string would be taken for a text."""
  return {"type": "image", "image": picture}


def edit_request(picture: Picture, instruction: str = "") -> Dialogue:
  """The message of an edit; without an instruction, of a reconstruction (spec 4.4)."""
  words = f"\n{instruction}" if instruction.strip() else templates.RECONSTRUCT.removeprefix("<image>")
  return [{"role": "user", "content": [shown(picture), words]}]


def listed_requests(requests: str | Dialogue | Sequence[str | Dialogue]) -> tuple[list, bool]:
  """A list of requests, and whether it was but one: a text, or a dialogue (a list of messages)."""
  if isinstance(requests, str) or (requests and isinstance(requests[0], Mapping)):
    return [requests], True
  return list(requests), False


def make_rows(make: Callable, requests: Sequence, *args) -> list[Row]:
  """`make(request, *args)` of each; where there are several, errors say which one they mean."""
  rows = []
  for i, request in enumerate(requests):
    try:
      rows.append(make(request, *args))
    except UserError as error:
      raise (UserError(f"prompt {i}: {error}") if len(requests) > 1 else error) from None
  return rows


class Prompts:
  """Makes rows for one model, and batches of rows."""

  def __init__(self, cfg: Blip3oConfig, tokenizer: Tokenizer, pictures: Pictures | None, name: str):
    self.cfg, self.tokenizer, self.pictures, self.name = cfg, tokenizer, pictures, name

  def to_draw(self, request: str | Dialogue, *, form: str = "inference", wording: str = "release") -> Row:
    """A request for a picture: a caption, which is put in words, or a dialogue, taken as it is.

    Its pictures are squashed to the square of the CLIP encoder, as in the release (spec 4.4).
    """
    if isinstance(request, str):
      if not request.strip():
        raise UserError("the prompt is empty; say what to draw")
      request = [{"role": "user", "content": templates.worded(request, wording)}]
    return self._row(request, lambda *said: templates.drawing_prompt(*said, form=form), LONGEST_TO_DRAW, squash=True)

  def to_answer(self, request: str | Dialogue) -> Row:
    """A text or a dialogue that ends with the user; pictures keep their proportions."""
    if isinstance(request, str):
      request = [{"role": "user", "content": request}]
    return self._row(request, templates.chat_prompt, LONGEST, squash=False)

  def batch(self, rows: Sequence[Row], *, draw: bool, length: int = 0) -> Batch:
    """Rows side by side, padded to a bucket of at least `length` tokens.

    draw: positions count on through pictures, as in the release's drawing; else they are the tower's own (M-RoPE).
    """
    length = bucket(max(length, *(len(row.tokens) for row in rows)))
    mask = np.arange(length) < np.asarray([len(row.tokens) for row in rows])[:, None]
    tokens = [row.tokens + [self.tokenizer.pad] * (length - len(row.tokens)) for row in rows]
    tokens = np.asarray(tokens, np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (len(rows), 3, length))
    if not any(row.pictures for row in rows):
      return Batch(tokens, mask, positions, {})
    most = max(sum(map(self.pictures.tokens, row.pictures)) for row in rows)
    arrays = self.pictures.rows([row.pictures for row in rows], tokens=bucket(most))
    if not draw:
      positions = self.pictures.positions(tokens, mask, arrays)
    keys = BACKBONES[type(self.cfg.backbone)].image_keys
    return Batch(tokens, mask, positions, {key: arrays[key] for key in keys})

  def _row(self, request: Dialogue, template, longest: int, *, squash: bool) -> Row:
    messages, pictures = _read(request)
    if any(pictures) and self.pictures is None:
      raise UserError(f"{self.name} takes requests without pictures only: its language model does not see")
    if squash:
      side = self.cfg.clip.image_size
      pictures = [[transforms.square(p, side, "squash") for p in row] for row in pictures]
    read = [[self.pictures.read(picture) for picture in row] for row in pictures]
    places = [[self.pictures.place(one) for one in row] for row in read]
    said, seen = template(self.tokenizer, messages, places if any(pictures) else None), tuple(itertools.chain(*read))
    if len(said) > longest:
      raise UserError(f"the prompt has {len(said)} tokens, {longest} are the most; shorten it")
    # Written in the words it would be filled, or not, by what the batch has beside it.
    if self.pictures and said.count(self.pictures.image_token) != sum(map(self.pictures.tokens, seen)):
      word = self.tokenizer.decode([self.pictures.image_token], skip_special=False)
      raise UserError(f"the words hold {word}, which stands for a picture; leave it out")
    return Row(said, seen)


def _read(request: Dialogue) -> tuple[list[tuple[str, str]], list[list[Image.Image]]]:
  """(role, text with "<image>") of every message, and the pictures of every message."""
  if not isinstance(request, Sequence) or not request or not all(isinstance(one, Mapping) for one in request):
    raise UserError('a dialogue is a list of messages {"role": "user", "content": TEXT or [TEXT, PICTURE, ...]}')
  messages, pictures = [], []
  for i, one in enumerate(request):
    if one.get("role") not in ROLES or "content" not in one:
      raise UserError(f"message {i} needs a role of {', '.join(ROLES)} and a content; it has {dict(one)!r:.80}")
    content = one["content"] if isinstance(one["content"], list | tuple) else [one["content"]]
    parts = [_part(part) for part in content]
    text = "".join("<image>" if is_picture else part for part, is_picture in parts)
    if one["role"] == "user" and not text.strip():
      raise UserError(f"message {i} is empty; say something")
    messages.append((one["role"], text))
    pictures.append([transforms.open_picture(part) for part, is_picture in parts if is_picture])
  if messages[-1][0] != "user":
    raise UserError(f"the last message is the {messages[-1][0]}'s; a dialogue is answered where the user spoke last")
  return messages, pictures


def _part(part: Any) -> tuple[Any, bool]:
  """A part of a message, and whether it is a picture. A path is a Path, or marked as one: a bare string is a text."""
  if not isinstance(part, Mapping):
    return part, not isinstance(part, str)
  kind = next((kind for kind in ("text", "image") if part.get("type") == kind and kind in part), None)
  if kind is None or (kind == "text" and not isinstance(part["text"], str)):
    known = '{"type": "text", "text": TEXT} or {"type": "image", "image": PICTURE}'
    raise UserError(f"{dict(part)!r:.80} is no part of a message; give {known}")
  return part[kind], kind == "image"
