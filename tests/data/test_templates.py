import json

import numpy as np
import pytest

from blip3o_jax.data import templates
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(golden):
  return load_tokenizer(golden("tokenizer").path)


HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASKED = HEAD + "Please generate image based on the following caption: a red fox<|im_end|>\n<|im_start|>assistant\n"


def text_of(tokenizer, tokens):
  return tokenizer.decode(tokens, skip_special=False)


def test_generation_prompt_is_the_recorded_one(tokenizer, golden):
  stored = json.loads((golden("tokenizer").path / "tokenization_cases.json").read_text())
  tokens = templates.generation_prompt(tokenizer, "a red fox")
  assert text_of(tokenizer, tokens[:-1]) == stored["chat_rendered"] == ASKED
  assert tokens[-1] == tokenizer.image_start
  assert tokens[:-1] == next(case["ids"] for case in stored["cases"] if case["text"] == stored["chat_rendered"])


def test_generation_prompt_of_the_recorded_run(tokenizer, golden):
  recording = golden("blip3o_generate")
  ids, mask = recording.io["batch_left:input_ids"], recording.io["batch_left:attention_mask"]
  for prompt, row, valid in zip(recording.config["prompts"], ids, mask, strict=True):
    caption = prompt.split("caption: ")[1].split("<|im_end|>")[0]
    assert templates.generation_prompt(tokenizer, caption) == row[valid.astype(bool)].tolist()


def test_training_form_and_paper_wording(tokenizer):
  tokens = templates.generation_prompt(tokenizer, "a red fox", form="training")
  assert text_of(tokenizer, tokens) == ASKED + "<|im_end|>\n[IMG]"
  tokens = templates.generation_prompt(tokenizer, "a red fox", wording="paper")
  assert "generate an image based" in text_of(tokenizer, tokens)
  with pytest.raises(UserError, match="form"):
    templates.generation_prompt(tokenizer, "a", form="other")


def test_reconstruction_prompt(tokenizer):
  pads = "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
  tokens = templates.generation_prompt(tokenizer, templates.RECONSTRUCT, wording=None, places=[pads])
  want = HEAD + pads + "\nPlease reconstruct the given image.<|im_end|>\n<|im_start|>assistant\n[IMG]"
  assert text_of(tokenizer, tokens) == want


def test_conversation_labels_are_the_answers_and_their_ends(tokenizer):
  turns = [("<image>\nwhat is it?", "a red fox"), ("is it old?", "no")]
  pads = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
  tokens, labels = templates.conversation(tokenizer, turns, [pads])
  said = np.asarray(labels) != -100
  assert text_of(tokenizer, np.asarray(tokens)[said]) == "a red fox<|im_end|>no<|im_end|>"
  assert (np.asarray(tokens) == labels)[said].all()
  want = f"{HEAD}{pads}\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
  assert text_of(tokenizer, tokens).startswith(want + "a red fox<|im_end|>\n<|im_start|>user\nis it old?")
  assert tokens[: len(tokenizer.encode(want))] == templates.chat_prompt(tokenizer, [("user", turns[0][0])], [[pads]])


def test_pictures_must_have_places(tokenizer):
  with pytest.raises(UserError, match="1 pictures but 0 <image>"):
    templates.chat_prompt(tokenizer, [("user", "what is it?")], [["x"]])
