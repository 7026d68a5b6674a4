"""Messages and pictures -> rows -> batches: layouts, lengths, and what is refused."""

import numpy as np
import pytest
import tiny
from PIL import Image

from blip3o_jax.data.pictures import QwenPictures
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.data.vision import ImageProcessor
from blip3o_jax.errors import UserError
from blip3o_jax.inference.prompts import LONGEST_TO_DRAW, Prompts, bucket

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
RED, TALL = Image.new("RGB", (24, 24), (200, 30, 20)), Image.new("RGB", (16, 64), (9, 9, 9))


@pytest.fixture(scope="module")
def prompts(tiny_directory):
  backbone = tiny.config().backbone
  processor = ImageProcessor(patch_size=8, min_pixels=256, max_pixels=4096)
  pictures = QwenPictures(processor, backbone.image_token, backbone.vision.window_size)
  return Prompts(tiny.config(), load_tokenizer(tiny_directory / "tokenizer"), pictures, "tiny")


def text_of(prompts, row):
  return prompts.tokenizer.decode(row.tokens, skip_special=False)


def place(count):
  return "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"


def user(*content):
  return {"role": "user", "content": list(content)}


def test_buckets_are_few_and_not_much_longer():
  lengths = np.arange(1, 5000)
  buckets = np.asarray([bucket(int(n)) for n in lengths])
  assert (buckets >= lengths).all() and (np.diff(buckets) >= 0).all() and (buckets % 16 == 0).all()
  assert (buckets[128:] < 1.25 * lengths[128:]).all() and len(set(buckets)) < 40
  assert [bucket(n) for n in (1, 16, 17, 128, 129, 1000)] == [16, 16, 32, 128, 160, 1024]


def test_a_dialogue_of_several_turns_and_pictures(prompts):
  """Each picture where it was shown, in the user's words or the assistant's, in its own proportions."""
  talk = [
    user("what is ", RED, " and ", TALL, "?"),
    {"role": "assistant", "content": "two pictures"},
    {"role": "user", "content": "draw one"},
    {"role": "assistant", "content": [RED]},
    user({"type": "image", "image": TALL}, {"type": "text", "text": "like this?"}),
  ]
  row = prompts.to_answer(talk)
  said = [
    f"<|im_start|>user\nwhat is {place(4)} and {place(4)}?<|im_end|>\n",
    "<|im_start|>assistant\ntwo pictures<|im_end|>\n<|im_start|>user\ndraw one<|im_end|>\n",
    f"<|im_start|>assistant\n{place(4)}<|im_end|>\n<|im_start|>user\n{place(4)}like this?<|im_end|>\n",
  ]
  assert text_of(prompts, row) == SYSTEM + "".join(said) + "<|im_start|>assistant\n"
  assert [grid.tolist() for _, grid in row.pictures] == [[1, 4, 4], [1, 8, 2], [1, 4, 4], [1, 8, 2]]
  np.testing.assert_array_equal(row.pictures[0][0], prompts.pictures.read(RED)[0])
  batch = prompts.batch([row, prompts.to_answer("hello")], draw=False)
  assert batch.tokens.shape == batch.mask.shape and batch.vision["patches"].shape[:2] == (2, 64)
  assert (batch.positions[0, 1] != batch.positions[0, 2]).any()  # rows and columns of the pictures


def test_a_picture_alone_may_be_the_content(prompts):
  alone, listed = ([{"role": "user", "content": content}] for content in (RED, [RED]))
  assert prompts.to_answer(alone).tokens == prompts.to_answer(listed).tokens
  assert prompts.to_answer([{"role": "user", "content": np.asarray(RED)}]).tokens == prompts.to_answer(listed).tokens


def test_a_system_message_takes_the_place_of_the_usual_one(prompts):
  row = prompts.to_answer([{"role": "system", "content": "Be brief."}, user("hello")])
  assert text_of(prompts, row).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello")


def test_what_is_drawn(prompts):
  """A caption is put in words; a dialogue stays as it is, its pictures squashed, its positions plain (spec 4.2-4.4)."""
  caption = prompts.to_draw("a red fox")
  want = "Please generate image based on the following caption: a red fox<|im_end|>\n<|im_start|>assistant\n[IMG]"
  assert text_of(prompts, caption) == SYSTEM + "<|im_start|>user\n" + want
  edit = prompts.to_draw([user(TALL, "\nmake it blue")])
  want = f"<|im_start|>user\n{place(1)}\nmake it blue<|im_end|>\n<|im_start|>assistant\n[IMG]"
  assert text_of(prompts, edit) == SYSTEM + want and edit.pictures[0][1].tolist() == [
    1,
    2,
    2,
  ]  # 16 x 16, the encoder's side
  trained = prompts.to_draw("a red fox", form="training", wording="paper")
  assert text_of(prompts, trained).endswith("<|im_start|>assistant\n<|im_end|>\n[IMG]")
  batch = prompts.batch([caption, edit], draw=True)
  assert (batch.positions == np.arange(batch.tokens.shape[1])).all()
  assert prompts.batch([caption], draw=True).vision == {} and set(batch.vision) == set(tiny_keys())
  assert prompts.batch([caption], draw=True, length=200).tokens.shape == (1, bucket(200))


def tiny_keys():
  return ("patches", "patch_pos", "patch_image", "patch_window")


def test_what_is_refused(prompts):
  long = "circle " * 10000
  cases = [
    (lambda: prompts.to_draw("\n "), "the prompt is empty"),
    (lambda: prompts.to_draw(long), f"the prompt has 10,?0.. tokens, {LONGEST_TO_DRAW} are the most; shorten it"),
    (lambda: prompts.to_answer(""), "message 0 is empty"),
    (lambda: prompts.to_answer(long * 4), "32768 are the most"),
    (lambda: prompts.to_answer([]), "a dialogue is a list of messages"),
    (lambda: prompts.to_answer(["hello"]), "a dialogue is a list of messages"),
    (lambda: prompts.to_answer([{"role": "bot", "content": "a"}]), "message 0 needs a role of system, user, assistant"),
    (lambda: prompts.to_answer([{"role": "user"}]), "message 0 needs a role"),
    (
      lambda: prompts.to_answer([user("hi"), {"role": "assistant", "content": "ho"}]),
      "last message is the assistant's",
    ),
    (lambda: prompts.to_answer([user("what is <image>?", RED)]), "1 pictures but 2 <image>"),
    # Else what they stand for would depend on the rows beside them.
    (lambda: prompts.to_draw("a <|image_pad|>"), r"the words hold <\|image_pad\|>, which stands for a picture; leave"),
    (lambda: prompts.to_answer([user(RED, "<|image_pad|>?")]), "which stands for a picture"),
    (lambda: prompts.to_answer([user(None, "hi")]), "a picture is a NoneType"),
    (lambda: prompts.to_answer([{"role": "user", "content": None}]), "a picture is a NoneType"),
    # As other libraries write it: a path taken for words would be answered without a look at the picture.
    (lambda: prompts.to_answer([user({"type": "image_url", "image_url": "a.png"})]), "a.png'} is no part of a message"),
    (lambda: prompts.to_answer([user({"type": "text", "text": RED})]), "is no part of a message"),
    (lambda: prompts.to_answer([user(Image.new("RGB", (4000, 10)), "hi")]), "too long and thin"),
  ]
  for run, words in cases:
    with pytest.raises(UserError, match=words) as error:
      run()
    assert "\n" not in str(error.value)
