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


def message(role: str, content: str) -> str:
  """One finished message."""
  return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def place_images(text: str, image_tokens: Sequence[int]) -> str:
  """Every "<image>" of a text becomes the place of a picture of so many tokens, in order.

  Raises:
    UserError: the number of "<image>" is not the number of pictures.
  """
  first, *rest = text.split("<image>")
  if len(rest) != len(image_tokens):
    raise UserError(
      f"{len(image_tokens)} pictures but {len(rest)} <image> in {text[:60]!r}; write one for each picture"
    )
  pads = ["<|image_pad|>" * n for n in image_tokens]
  return first + "".join(f"<|vision_start|>{pad}<|vision_end|>{part}" for pad, part in zip(pads, rest, strict=True))


def chat_prompt(
  tokenizer, messages: Sequence[tuple[str, str]], image_tokens: Sequence[Sequence[int]] | None = None
) -> list[int]:
  """Tokens of a dialogue up to where the assistant answers.

  Args:
    messages: (role, text) each; "<image>" where a picture lies. Without a first "system" one, `SYSTEM` is said.
    image_tokens: for every message the tokens of each of its pictures after merging; None: no pictures at all, and
      "<image>" is a word like any other.
  """
  tokens = [] if messages and messages[0][0] == "system" else tokenizer.encode(message("system", SYSTEM))
  for (role, text), counts in zip(messages, image_tokens or [None] * len(messages), strict=True):
    tokens += tokenizer.encode(message(role, text if counts is None else place_images(text, counts)))
  return tokens + tokenizer.encode("<|im_start|>assistant\n")


def drawing_prompt(
  tokenizer,
  messages: Sequence[tuple[str, str]],
  image_tokens: Sequence[Sequence[int]] | None = None,
  *,
  form: str = "inference",
) -> list[int]:
  """Tokens of a dialogue after which a picture is drawn, ending with the image-start token; the model appends its
  queries.

  Args:
    messages, image_tokens: see chat_prompt.
    form: "inference" stops after the assistant's header. "training" is what the release trains on: two more tokens
      close an empty answer before the image-start token (spec 4.3).
  """
  if form not in FORMS:
    raise UserError(f"form {form!r} is unknown; choose from {FORMS}")
  tail = tokenizer.encode("<|im_end|>\n") if form == "training" else []
  return [*chat_prompt(tokenizer, messages, image_tokens), *tail, tokenizer.image_start]


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
  image_tokens: Sequence[int] = (),
) -> list[int]:
  """`drawing_prompt` of one caption.

  Args:
    caption: what to draw; with `wording=None` the whole human message (reconstruction and editing: "<image>\\n...").

  Raises:
    UserError: unknown form or wording.
  """
  human = worded(caption, wording) if wording else caption
  return drawing_prompt(tokenizer, [("user", human)], [image_tokens] if image_tokens else None, form=form)


def conversation(
  tokenizer, turns: Sequence[tuple[str, str]], image_tokens: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
  """Tokens and labels of a whole conversation; labels are the tokens of the answers and their <|im_end|>, else -100.

  Args:
    turns: (human, assistant) texts; "<image>" in the first human text is where its pictures lie.
    image_tokens: tokens of each picture after merging.
  """
  tokens = tokenizer.encode(message("system", SYSTEM))
  labels = [IGNORE] * len(tokens)
  for i, (human, answer) in enumerate(turns):
    asked = tokenizer.encode(message("user", place_images(human, image_tokens if i == 0 else ())))
    asked += tokenizer.encode("<|im_start|>assistant\n")
    said, after = tokenizer.encode(f"{answer}<|im_end|>"), tokenizer.encode("\n")
    tokens += asked + said + after
    labels += [IGNORE] * len(asked) + said + [IGNORE] * len(after)
  return tokens, labels
