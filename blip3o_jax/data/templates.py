"""Chat templates (spec 4): the words around a caption or question, their tokens, and which of them are answers.

Messages are rendered and tokenised one by one, as the release does.
"""

from collections.abc import Sequence

from blip3o_jax.errors import UserError

SYSTEM = "You are a helpful assistant."
WORDINGS = {
  "release": "Please generate image based on the following caption: {caption}",  # spec 4.2
  "paper": "Please generate an image based on the following caption: {caption}",  # spec 14
}
RECONSTRUCT = "<image>\nPlease reconstruct the given image."  # spec 4.4
FORMS = ("inference", "training")
IGNORE = -100  # label of a token that is no answer


def place_images(text: str, places: Sequence[str]) -> str:
  """Every "<image>" of a text becomes the place of a picture (see data.pictures), in order.

  Raises:
    UserError: the number of "<image>" is not the number of pictures.
  """
  first, *rest = text.split("<image>")
  if len(rest) != len(places):
    raise UserError(f"{len(places)} pictures but {len(rest)} <image> in {text[:60]!r}; write one for each picture")
  return first + "".join(place + part for place, part in zip(places, rest, strict=True))


def chat_prompt(
  tokenizer, messages: Sequence[tuple[str, str]], places: Sequence[Sequence[str]] | None = None
) -> list[int]:
  """Tokens of a dialogue up to where the assistant answers.

  Args:
    messages: (role, text) each; "<image>" where a picture lies. Without a first "system" one, `SYSTEM` is said.
    places: for every message what stands for each of its pictures; None: no pictures at all, and "<image>" is a word
      like any other.
  """
  chat = tokenizer.chat
  tokens = tokenizer.encode(chat.before)
  if not messages or messages[0][0] != "system":
    tokens += tokenizer.encode(chat.message("system", SYSTEM))
  for (role, text), own in zip(messages, places or [None] * len(messages), strict=True):
    tokens += tokenizer.encode(chat.message(role, text if own is None else place_images(text, own)))
  return tokens + tokenizer.encode(chat.header.format(role="assistant"))


def drawing_prompt(
  tokenizer,
  messages: Sequence[tuple[str, str]],
  places: Sequence[Sequence[str]] | None = None,
  *,
  form: str = "inference",
) -> list[int]:
  """Tokens of a dialogue after which a picture is drawn, ending with the image-start token; the model appends its
  queries.

  Args:
    messages, places: see chat_prompt.
    form: "inference" stops after the assistant's header. "training" is what the release trains on: two more tokens
      close an empty answer before the image-start token (spec 4.3).
  """
  if form not in FORMS:
    raise UserError(f"form {form!r} is unknown; choose from {FORMS}")
  tail = tokenizer.encode(tokenizer.chat.end + tokenizer.chat.after) if form == "training" else []
  return [*chat_prompt(tokenizer, messages, places), *tail, tokenizer.image_start]


def worded(caption: str, wording: str = "release") -> str:
  """The request to draw a caption. Raises UserError for an unknown wording."""
  if wording not in WORDINGS:
    raise UserError(f"wording {wording!r} is unknown; choose from {tuple(WORDINGS)}")
  return WORDINGS[wording].format(caption=caption)


def generation_prompt(
  tokenizer,
  caption: str,
  *,
  form: str = "inference",
  wording: str | None = "release",
  places: Sequence[str] = (),
) -> list[int]:
  """`drawing_prompt` of one caption.

  Args:
    caption: what to draw; with `wording=None` the whole human message (reconstruction and editing: "<image>\\n...").

  Raises:
    UserError: unknown form or wording.
  """
  human = worded(caption, wording) if wording else caption
  return drawing_prompt(tokenizer, [("user", human)], [places] if places else None, form=form)


def conversation(
  tokenizer, turns: Sequence[tuple[str, str]], places: Sequence[str] = ()
) -> tuple[list[int], list[int]]:
  """Tokens and labels of a whole conversation; labels are the tokens of the answers and their ends, else -100.

  Args:
    turns: (human, assistant) texts; "<image>" in the first human text is where its pictures lie.
    places: what stands for each picture.
  """
  chat = tokenizer.chat
  tokens = tokenizer.encode(chat.before + chat.message("system", SYSTEM))
  labels = [IGNORE] * len(tokens)
  for i, (human, answer) in enumerate(turns):
    asked = tokenizer.encode(chat.message("user", place_images(human, places if i == 0 else ())))
    asked += tokenizer.encode(chat.header.format(role="assistant"))
    said, after = tokenizer.encode(answer + chat.end), tokenizer.encode(chat.after)
    tokens += asked + said + after
    labels += [IGNORE] * len(asked) + said + [IGNORE] * len(after)
  return tokens, labels
