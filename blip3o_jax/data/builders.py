"""From a record of a source (data.sources) to the arrays of one sample: one class for each task."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from blip3o_jax.data import templates, transforms
from blip3o_jax.data.pictures import Pictures, QwenPictures
from blip3o_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where samples are and how one becomes arrays: `config.data`, or one of its `groups`.

  task: images | captions | generation | features | conversations.
  path: what data.sources.SourceConfig.path is, where there is one source; else `sources`: its fields by name of source.
  image_size: side of `pixels`; resize: crop | squash. max_length: tokens a row. max_patches: patches a row, where
  pictures may have any size (Qwen2.5-VL).
  buckets: shorter lengths to which training cuts a batch whose rows all fit (see training.feed.Buckets); () = never.
  form, wording: see templates.generation_prompt.
  rows: of a group, its part of every batch: a batch of `groups` with rows 3 and 1 is three quarters of the first.
  """

  task: str
  path: str | tuple[str, ...] = ""
  sources: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  image_size: int = 64
  resize: str = "crop"
  max_length: int = 64
  buckets: tuple[int, ...] = ()
  max_patches: int = 0
  form: str = "inference"
  wording: str = "release"
  rows: int = 1

  def __post_init__(self):
    require_whole(self, image_size=1, max_length=1, max_patches=0, rows=1)
    for field, known in (("resize", transforms.MODES), ("form", templates.FORMS), ("wording", templates.WORDINGS)):
      if (value := getattr(self, field)) not in known:
        raise UserError(f"data.{field} {value!r} is unknown; choose one of {', '.join(known)}")
    if not isinstance(self.sources, Mapping):
      raise UserError(f"data.sources is {self.sources!r}; give the fields of each source by its name")
    if not isinstance(self.buckets, list | tuple) or not all(isinstance(length, int) for length in self.buckets):
      raise UserError(f"data.buckets is {self.buckets!r}; give a list of lengths")
    lengths = (0, *self.buckets, self.max_length)
    if any(a >= b for a, b in zip(lengths, lengths[1:], strict=False)):
      raise UserError(f"data.buckets {self.buckets} must rise and stay below max_length {self.max_length}")
    if self.buckets and self.task == "images":
      raise UserError("data.buckets cuts rows of tokens, which task images has none of; leave it out")


def require_whole(config, **least: int) -> None:
  """Raise UserError unless the fields named are whole numbers of at least so much."""
  for field, low in least.items():
    value = getattr(config, field)
    if not isinstance(value, int) or value < low:
      raise UserError(f"data.{field} is {value!r}; take a whole number from {low} on")


def make_builder(cfg: DataConfig, tokenizer=None, pictures: Pictures | None = None) -> Callable[[dict], dict]:
  """The function from a record of a source to the arrays of one sample, for `cfg.task`."""
  builders = {"images": _Images, "captions": _Captions, "generation": _Generation, "features": _Features}
  builders["conversations"] = _Conversations
  if cfg.task not in builders:
    raise UserError(f"data task {cfg.task!r} is unknown; choose one of {', '.join(builders)}")
  if cfg.task != "images" and tokenizer is None:
    raise UserError(f"data task {cfg.task} needs a tokenizer")
  if cfg.task == "conversations" and pictures is None:
    raise UserError("data task conversations needs a backbone that sees pictures: Qwen2.5-VL, or Qwen3 with SigLIP2")
  if cfg.task == "conversations" and isinstance(pictures, QwenPictures) and not cfg.max_patches:
    raise UserError("data task conversations needs max_patches for Qwen2.5-VL, whose pictures have any size")
  return builders[cfg.task](cfg, tokenizer, pictures)


@dataclasses.dataclass(frozen=True)
class _Builder:
  cfg: DataConfig
  tokenizer: Any
  pictures: Pictures | None

  def __call__(self, record: dict) -> dict[str, np.ndarray]:
    """The arrays of a record. Raises UserError, which names it."""
    try:
      return self.arrays(record)
    except UserError as error:
      if record["name"] in str(error):
        raise
      raise UserError(f"{record['name']}: {error}") from None

  def pixels(self, record: dict) -> np.ndarray:
    if not record.get("image"):
      raise UserError(f"{record['name']} has no picture")
    return transforms.square(transforms.decode(record["image"], record["name"]), self.cfg.image_size, self.cfg.resize)

  def text(self, record: dict) -> str:
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
      raise UserError(f"{record['name']} has {'an empty' if isinstance(text, str) else 'no'} caption")
    return text

  def row(self, tokens: list[int], last: int | None = None) -> dict[str, np.ndarray]:
    """tokens [L] int32, token_mask [L] bool, cut (int32, of tokens): cut to max_length, padded on the right.

    last: a token that stays the last one whatever is cut.
    """
    length = self.cfg.max_length
    cut = max(len(tokens) - length, 0)
    if cut and last is not None:
      tokens = [*tokens[: length - 1], last]
    return {
      "tokens": _pad(tokens, length, self.tokenizer.pad),
      "token_mask": np.arange(length) < len(tokens),
      "cut": np.int32(cut),
    }


class _Images(_Builder):
  """pixels [H, W, 3] uint8."""

  def arrays(self, record: dict) -> dict[str, np.ndarray]:
    return {"pixels": self.pixels(record)}


class _Captions(_Builder):
  """pixels, and the tokens and token_mask of the bare caption."""

  def arrays(self, record: dict) -> dict[str, np.ndarray]:
    return {"pixels": self.pixels(record)} | self.row(self.tokenizer.encode(self.text(record)))


class _Generation(_Builder):
  """pixels; tokens and token_mask of the prompt, its last token the image start; positions [3, L], all axes alike."""

  def arrays(self, record: dict) -> dict[str, np.ndarray]:
    return {"pixels": self.pixels(record)} | self.prompt(record)

  def prompt(self, record: dict) -> dict[str, np.ndarray]:
    cfg = self.cfg
    # The tail of a long prompt is cut, as the release does (to 448 there, with the image start; spec 4.2).
    tokens = templates.generation_prompt(self.tokenizer, self.text(record), form=cfg.form, wording=cfg.wording)
    row = self.row(tokens, last=self.tokenizer.image_start)
    positions = np.where(row["token_mask"], np.arange(cfg.max_length), 0)
    positions = np.broadcast_to(positions.astype(np.int32), (3, cfg.max_length))
    return {"positions": positions} | row


class _Features(_Generation):
  """The same with the picture's cached features [N, C] in the place of its pixels."""

  def arrays(self, record: dict) -> dict[str, np.ndarray]:
    return {"features": record["features"]} | self.prompt(record)


class _Conversations(_Builder):
  """tokens, token_mask, labels [L], positions [3, L], and the arrays of the row's picture (see data.pictures)."""

  def arrays(self, record: dict) -> dict[str, np.ndarray]:
    cfg, pictures = self.cfg, self.pictures
    seen = [pictures.read(transforms.decode(record["image"], record["name"]))] if record.get("image") else []
    arrays = pictures.rows([seen], tokens=cfg.max_patches // pictures.patches_a_token, images=1)
    tokens, labels = templates.conversation(self.tokenizer, turns(record), [pictures.place(x) for x in seen])
    row = self.row(tokens) | {"labels": _pad(labels, cfg.max_length, templates.IGNORE)}
    if not (row["labels"] != templates.IGNORE).any():
      raise UserError(f"{record['name']} has no answer within {cfg.max_length} tokens")
    positions = pictures.positions(row["tokens"][None], row["token_mask"][None], arrays)
    return row | {"positions": positions[0]} | {key: value[0] for key, value in arrays.items()}


def turns(record: dict) -> list[tuple[str, str]]:
  """LLaVA's "conversations" as (human, assistant) pairs. Raises UserError if they are not of this kind."""
  try:
    messages = [(message["from"], message["value"]) for message in record["conversations"]]
    roles, texts = zip(*messages, strict=True)
    if roles != ("human", "gpt") * (len(messages) // 2) or not all(isinstance(text, str) for text in texts):
      raise ValueError
  except (KeyError, TypeError, ValueError):
    raise UserError(f"{record['name']}: conversations must be human and gpt messages in turn, all text") from None
  return list(zip(texts[::2], texts[1::2], strict=True))


def _pad(values: list[int], length: int, fill: int) -> np.ndarray:
  values = np.asarray(values[:length], np.int32)
  return np.pad(values, (0, length - len(values)), constant_values=fill)
