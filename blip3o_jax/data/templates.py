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
  """Every "<image>" of a human message becomes the place of a picture of so many tokens, in order.

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


def chat_prompt(tokenizer, turns: Sequence[tuple[str, str | None]], image_tokens: Sequence[int] = ()) -> list[int]:
  """Tokens up to where the assistant answers the last turn, whose own answer is not used.

  Args:
    turns: (human, assistant) texts; "<image>" in the first human text is where its pictures lie.
    image_tokens: tokens of each picture after merging.
  """
  tokens = tokenizer.encode(message("system", SYSTEM))
  for i, (human, answer) in enumerate(turns):
    tokens += tokenizer.encode(message("user", place_images(human, image_tokens if i == 0 else ())))
    tokens += tokenizer.encode("<|im_start|>assistant\n" if i == len(turns) - 1 else message("assistant", answer))
  return tokens


def generation_prompt(
  tokenizer,
  caption: str,
  *,
  form: str = "inference",
  wording: str = "release",
  image_tokens: Sequence[int] = (),
  max_length: int | None = None,
) -> list[int]:
  """Tokens of a request for a picture, ending with the image-start token; the model appends its queries.

  Args:
    caption: what to draw; with `wording=None` the whole human message (reconstruction and editing: "<image>\\n...").
    form: "inference" stops after the assistant's header. "training" is what the release trains on: two more tokens
      close an empty answer before the image-start token (spec 4.3).
    max_length: limit including the image-start token; the tail is cut, as the release does (448 there, spec 4.2).

  Raises:
    UserError: unknown form or wording.
  """
  if form not in FORMS or wording not in (*WORDINGS, None):
    raise UserError(f"form {form!r}, wording {wording!r}: choose from {FORMS} and {tuple(WORDINGS)}")
  human = WORDINGS[wording].format(caption=caption) if wording else caption
  human = place_images(human, image_tokens) if image_tokens else human
  tokens = tokenizer.encode(message("system", SYSTEM)) + tokenizer.encode(message("user", human))
  tokens += tokenizer.encode("<|im_start|>assistant\n" if form == "inference" else message("assistant", ""))
  return tokens[: max_length - 1 if max_length else None] + [tokenizer.image_start]


def conversation(
  tokenizer, turns: Sequence[tuple[str, str]], image_tokens: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
  """Tokens and labels of a whole conversation; labels are the tokens of the answers and their <|im_end|>, else -100.

  Args: see chat_prompt.
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
