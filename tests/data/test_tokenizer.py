import json
import pickle
import re

import pytest

from blip3o_jax.data import shapes_corpus
from blip3o_jax.data.tokenizer import IMAGE_TOKENS, QWEN_TOKENS, load_tokenizer, train_tokenizer
from blip3o_jax.errors import UserError


@pytest.fixture(scope="module")
def trained():
  return train_tokenizer(shapes_corpus.tokenizer_texts(), 640)


@pytest.fixture(scope="module")
def recorded(golden):
  folder = golden("tokenizer").path
  return load_tokenizer(folder), json.loads((folder / "tokenization_cases.json").read_text())


def test_recorded_cases(recorded):
  tokenizer, stored = recorded
  assert stored["cases"]
  for case in stored["cases"]:
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"], skip_special=False) == case["decoded"]
  ids = stored["special_ids"]
  ours = [
    tokenizer.pad,
    tokenizer.end,
    tokenizer.image_start,
    tokenizer.placeholder,
    tokenizer.image_pad,
    tokenizer.vision_end,
  ]
  assert ours == [
    ids[n] for n in ("<|endoftext|>", "<|im_end|>", "[IMG]", "<image>", "<|image_pad|>", "<|vision_end|>")
  ]


def test_trained_one_is_of_the_recorded_kind(trained, recorded):
  ours, theirs = json.loads(trained.backend.to_str()), json.loads(recorded[0].backend.to_str())
  assert ours["normalizer"] == theirs["normalizer"] and ours["decoder"]["type"] == theirs["decoder"]["type"]
  for key in ("pattern", "behavior", "invert"):
    assert ours["pre_tokenizer"]["pretokenizers"][0][key] == theirs["pre_tokenizer"]["pretokenizers"][0][key]


def test_every_word_of_the_world_is_one_token(trained):
  words = {
    word for text in shapes_corpus.tokenizer_texts() for word in re.findall(r" ?[A-Za-z]+", re.sub("<[^>]*>", "", text))
  }
  assert len(words) > 80
  assert not [word for word in words if len(trained.encode(word)) != 1]
  assert len(trained.encode("a red circle left of a blue square")) == 8


def test_size_and_places_of_special_tokens(trained):
  assert len(trained) == 640
  assert [trained.backend.token_to_id(name) for name in (*QWEN_TOKENS, *IMAGE_TOKENS)] == list(range(630, 640))
  with pytest.raises(UserError, match="vocabulary of 200"):
    train_tokenizer(["a"], 200)


def test_text_survives(trained):
  for text in ("Ünïcode café — 東京 42!", " two  spaces\n\n\ttab", ""):
    assert trained.decode(trained.encode(text)) == text
  assert trained.encode("cafe\u0301") == trained.encode("café")
  assert trained.decode(trained.encode("a<|im_end|>")) == "a"


def test_deterministic_and_saved(trained, tmp_path):
  trained.save(tmp_path)
  again = train_tokenizer(shapes_corpus.tokenizer_texts(), 640)
  assert again.backend.to_str() == trained.backend.to_str()
  text = "<|im_start|>user\na cross [IMG]"
  assert (
    load_tokenizer(tmp_path).encode(text) == trained.encode(text) == pickle.loads(pickle.dumps(trained)).encode(text)
  )


def test_transformers_reads_it(trained, tmp_path):
  transformers = pytest.importorskip("transformers")
  trained.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = "<|im_start|>user\nthree yellow crosses on a gray background<|im_end|>\n"
  assert theirs(text)["input_ids"] == trained.encode(text)
  assert (theirs.pad_token_id, theirs.eos_token_id) == (trained.pad, trained.end)


def test_release_tokens_are_added_to_a_plain_qwen_tokenizer(trained, tmp_path):
  stored = json.loads(trained.backend.to_str())
  stored["added_tokens"] = [t for t in stored["added_tokens"] if t["content"] not in IMAGE_TOKENS]
  (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
  tokenizer = load_tokenizer(tmp_path)
  assert [tokenizer.image_start, tokenizer.placeholder] == [637, 639]


def test_errors(tmp_path):
  with pytest.raises(UserError, match="no tokenizer"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(UserError, match="cannot be read"):
    load_tokenizer(tmp_path)
