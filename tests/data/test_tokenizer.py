import json
import pickle
import random
import re

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from blip3o_jax.data import shapes_corpus, templates
from blip3o_jax.data.tokenizer import IMAGE_TOKENS, LLAMA, QWEN_TOKENS, load_tokenizer, require_same, train_tokenizer
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
  ours = [tokenizer.pad, tokenizer.end, tokenizer.image_start]
  assert ours == [ids[n] for n in ("<|endoftext|>", "<|im_end|>", "[IMG]")]


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


def test_settings_that_a_tokenizer_file_keeps_of_its_last_use_change_nothing(trained, tmp_path):
  trained.save(tmp_path)
  kept = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  kept.enable_truncation(5)
  kept.enable_padding(length=12)
  kept.save(str(tmp_path / "tokenizer.json"))
  for text in ("a circle", "a red circle left of a blue square"):
    assert load_tokenizer(tmp_path).encode(text) == trained.encode(text)


def test_halves_of_surrogate_pairs_are_no_text(trained):
  for text in ("a circle \ud83d", "a circle " * 50 + "\udc00"):
    with pytest.raises(UserError, match="'a circle .*' is no valid Unicode text"):
      trained.encode(text)


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


def test_another_numbering_is_found(trained, tmp_path):
  """One with more tokens behind is the same to weights that know the first ones; one with other words is not."""
  trained.save(tmp_path / "a")
  stored = json.loads(trained.backend.to_str())
  more = {"id": 640, "content": "<|more|>", "special": True}
  more |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(stored | {"added_tokens": [*stored["added_tokens"], more]}))
  train_tokenizer(["a yellow square"], 640).save(tmp_path / "c")
  for other in ("a", "b"):
    require_same(tmp_path / "a", tmp_path / other)
    require_same(tmp_path / other, tmp_path / "a")
  with pytest.raises(UserError, match=r"differ in \d+ tokens \(number 256 is '.*' in one and '.*' in the other\)"):
    require_same(tmp_path / "a", tmp_path / "c")


def test_the_tokenizer_depends_on_the_words_alone(monkeypatch):
  """So that weights and corpora of different versions of the world still speak one language."""
  words = shapes_corpus.tokenizer_texts()
  assert len(words) == len(set(words)) and all(re.fullmatch(r" ?[A-Za-z]+", word) for word in words)
  monkeypatch.setattr(shapes_corpus, "_rng", lambda *args: random.Random("other sentences"))
  assert shapes_corpus.tokenizer_texts.__wrapped__() == words


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
  assert tokenizer.image_start == 637 and tokenizer.encode("[/IMG]<image>") == [638, 639]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  """A tokenizer file of Llama 3's kind: byte-level BPE, its own special tokens, and a template that adds the first."""
  folder = tmp_path_factory.mktemp("llama")
  backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
  split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend.train_from_iterator(
    ["a red circle"] * 3, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
  )
  backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in LLAMA.tokens])
  first = backend.token_to_id("<|begin_of_text|>")
  backend.post_processor = processors.TemplateProcessing(
    single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", first)]
  )
  backend.save(str(folder / "tokenizer.json"))
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def test_a_llama_tokenizer(llama, tmp_path):
  """The release's tokens come after its own; conversations are written as Llama 3 was taught them, and begin once."""
  base = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json")).get_vocab_size()
  tokenizer = load_tokenizer(llama)
  assert len(tokenizer) == base + 3 and tokenizer.encode("[IMG][/IMG]<image>") == [base, base + 1, base + 2]
  assert tokenizer.image_start == base
  assert [tokenizer.pad, tokenizer.end] == [tokenizer.backend.token_to_id(t) for t in ("<|end_of_text|>", "<|eot_id|>")]
  head = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
  )
  answer = "<|start_header_id|>assistant<|end_header_id|>\n\n"
  text_of = lambda tokens: tokenizer.decode(tokens, skip_special=False)
  drawn = templates.generation_prompt(tokenizer, "a red circle")
  wish = head + "Please generate image based on the following caption: a red circle<|eot_id|>" + answer
  assert text_of(drawn) == wish + "[IMG]"
  assert text_of(templates.generation_prompt(tokenizer, "a red circle", form="training")) == wish + "<|eot_id|>[IMG]"
  tokens, labels = templates.conversation(tokenizer, [("what is it?", "a circle"), ("red?", "yes")])
  said = [token for token, label in zip(tokens, labels, strict=True) if label != templates.IGNORE]
  assert text_of(said) == "a circle<|eot_id|>yes<|eot_id|>"
  asked = templates.chat_prompt(tokenizer, [("user", "what is it?")])
  assert text_of(asked) == head + "what is it?<|eot_id|>" + answer and tokens[: len(asked)] == asked
  tokenizer.save(tmp_path)
  assert load_tokenizer(tmp_path).encode(wish) == tokenizer.encode(wish)


def test_a_tokenizer_of_another_family_is_refused(llama, tmp_path):
  stored = json.loads((llama / "tokenizer.json").read_text())
  stored["added_tokens"] = [t for t in stored["added_tokens"] if t["content"] != "<|eot_id|>"]
  (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
  with pytest.raises(UserError, match="lacks <|eot_id|>; use one of the Qwen2.5-VL, Qwen3 or Llama 3 family"):
    load_tokenizer(tmp_path)


def test_errors(tmp_path):
  with pytest.raises(UserError, match="no tokenizer"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(UserError, match="cannot be read"):
    load_tokenizer(tmp_path)
