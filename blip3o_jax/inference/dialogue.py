"""A talk with a model, in words and pictures: what it said and drew is part of what it reads next."""

from collections.abc import Iterator, Sequence

import numpy as np

from blip3o_jax.data import templates
from blip3o_jax.errors import UserError
from blip3o_jax.inference.model import Model
from blip3o_jax.inference.prompts import Message, Picture, shown

LONGEST_ANSWER = 1024  # tokens, as on the release's page (spec 4.5); most answers end by themselves long before


class Dialogue:
  """Remembers what was said. A picture that the model drew goes back into its context through the understanding tower,
  so that the next turn can ask about it or change it (the in-context use of the paper).

  Attributes:
    messages: all of it so far, as `Model.chat` and `Model.generate` take it.
  """

  def __init__(self, model: Model):
    self.model, self.messages = model, list[Message]()

  def say(
    self, text: str, images: Sequence[Picture] = (), *, max_new_tokens: int = LONGEST_ANSWER, **settings
  ) -> Iterator[str]:
    """The answer, piece by piece; `settings` are those of `Model.chat`. It is remembered once it has been read."""
    asked = self._with(text, images)
    pieces = self.model.chat(asked, stream=True, max_new_tokens=max_new_tokens, **settings)

    def remembered():
      said = []
      for piece in pieces:
        said.append(piece)
        yield piece
      self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]

    return remembered()

  def draw(self, text: str, images: Sequence[Picture] = (), **settings) -> np.ndarray:
    """A picture, uint8 [H, W, 3], of a caption in the light of all before; `settings` are those of `Model.generate`."""
    if not text.strip():
      raise UserError("the prompt is empty; say what to draw")
    asked = self._with(templates.worded(text, self.model.sampling.wording), images)
    ((picture,),) = self.model.generate(asked, **settings)
    self.messages = [*asked, {"role": "assistant", "content": [picture]}]
    return picture

  def _with(self, text: str, images: Sequence[Picture]) -> list[Message]:
    return [*self.messages, {"role": "user", "content": [*map(shown, images), text]}]
