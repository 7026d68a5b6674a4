"""The tokenizer: Qwen2.5's kind (byte-level BPE, NFC) trained small for the built-in world, or a model's own."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from blip3o_jax.data.outputs import write_atomically
from blip3o_jax.errors import UserError

# Qwen2.5's own (in its order), then those that the release adds (spec 4.1).
QWEN_TOKENS = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|image_pad|>",
  "<|video_pad|>",
)
IMAGE_TOKENS = ("[IMG]", "[/IMG]", "<image>")
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Chat:
  """How a family of language models writes a conversation.

  Attributes:
    tokens: special tokens by which the family is known.
    before: opens a conversation. header: opens a message of {role}. end: closes what was said. after: lies between two
      messages. end_of_text: ends a text, and pads.
  """

  tokens: tuple[str, ...]
  before: str
  header: str
  end: str
  after: str
  end_of_text: str

  def message(self, role: str, content: str) -> str:
    """One finished message."""
    return self.header.format(role=role) + content + self.end + self.after


# Qwen2.5 and Qwen3 (ChatML), and Llama 3.
QWEN = Chat(QWEN_TOKENS, "", "<|im_start|>{role}\n", "<|im_end|>", "\n", "<|endoftext|>")
LLAMA = Chat(
  ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
  "<|begin_of_text|>",
  "<|start_header_id|>{role}<|end_header_id|>\n\n",
  "<|eot_id|>",
  "",
  "<|end_of_text|>",
)


class Tokenizer:
  """Text <-> token ids. Names of special tokens inside a text become those tokens, as in the release.

  Attributes:
    chat: how its family writes a conversation.
    pad, end, end_of_text: ids of what pads, closes a message, ends a text.
    image_start: of [IMG], after which the queries come.
  """

  def __init__(self, backend: tokenizers.Tokenizer):
    """Tokens that the release adds are added where missing. Raises UserError for a family that is not known."""
    missing = {chat: [name for name in chat.tokens if backend.token_to_id(name) is None] for chat in (QWEN, LLAMA)}
    self.chat = min(missing, key=lambda chat: len(missing[chat]))
    if lacks := missing[self.chat]:
      raise UserError(f"the tokenizer lacks {', '.join(lacks)}; use one of the Qwen2.5-VL, Qwen3 or Llama 3 family")
    backend.no_truncation()  # a tokenizer.json keeps with which it was called last
    backend.no_padding()
    backend.add_special_tokens([_special(name) for name in IMAGE_TOKENS if backend.token_to_id(name) is None])
    self.backend = backend
    self.pad = self.end_of_text = backend.token_to_id(self.chat.end_of_text)
    self.end = backend.token_to_id(self.chat.end)
    self.image_start = backend.token_to_id("[IMG]")

  def __len__(self) -> int:
    return self.backend.get_vocab_size()

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, nothing added. Raises UserError for what is no valid Unicode."""
    # The template's words come again and again; long texts hardly ever do, and would fill the memory.
    return list(_encode_again(self.backend, text) if len(text) <= 256 else _encode(self.backend, text))

  def decode(self, tokens: Iterable[int], skip_special: bool = True) -> str:
    """The text of token ids."""
    return self.backend.decode([int(t) for t in tokens], skip_special_tokens=skip_special)

  def save(self, folder) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers reads them."""
    folder = Path(folder)
    config = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "eos_token": self.chat.end,
      "pad_token": self.chat.end_of_text,
      "bos_token": None,
      "unk_token": None,
      "add_bos_token": False,
      "add_prefix_space": False,
      "clean_up_tokenization_spaces": False,
      "additional_special_tokens": [*self.chat.tokens, *IMAGE_TOKENS],
    }
    for name, content in (
      ("tokenizer.json", self.backend.to_str(pretty=True)),
      ("tokenizer_config.json", json.dumps(config, indent=2)),
    ):
      write_atomically(folder / name, f"{content}\n".encode())


def _encode(backend: tokenizers.Tokenizer, text: str) -> tuple[int, ...]:
  try:
    return tuple(backend.encode(text, add_special_tokens=False).ids)
  except TypeError:  # JSON may hold halves of surrogate pairs, "\ud83d", which are no characters
    raise UserError(f"{text[:40]!r} is no valid Unicode text") from None


_encode_again = functools.lru_cache(maxsize=16384)(_encode)


def _special(name: str) -> tokenizers.AddedToken:
  return tokenizers.AddedToken(name, special=True, normalized=False)


def load_tokenizer(folder) -> Tokenizer:
  """The tokenizer in `folder`, in any layout that transformers reads. Raises UserError when there is none."""
  folder = Path(folder)
  if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
    raise UserError(f"no tokenizer at {folder}; give a folder with a tokenizer.json")
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
  from transformers import AutoTokenizer  # slow to import, and not every command talks

  try:
    return Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer)
  except UserError:
    raise
  except Exception as error:  # the library raises whatever comes
    raise UserError(f"the tokenizer at {folder} cannot be read: {' '.join(str(error).split())[:200]}") from None


def require_same(first, second) -> None:
  """That no number means one token in the tokenizer of folder `first` and another in that of `second`.

  Raises:
    UserError: one does, so that weights which learned the one would read nonsense through the other.
  """
  files = [Path(folder, "tokenizer.json") for folder in (first, second)]
  if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
    return
  ours, theirs = ({i: word for word, i in load_tokenizer(f).backend.get_vocab().items()} for f in (first, second))
  other = [i for i in sorted(ours) if theirs.get(i, ours[i]) != ours[i]]
  if other:
    i = other[0]
    raise UserError(
      f"the tokenizers {first} and {second} differ in {len(other)} tokens (number {i} is {ours[i]!r} in one and "
      f"{theirs[i]!r} in the other); weights that learned one cannot read the other, so give them their own"
    )


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
  """A byte-level BPE of exactly `size` entries: every byte, then the commonest pairs of `texts`, then special tokens.

  Where the texts have fewer pairs, unused names fill the gap, so that the special tokens are the last ten whatever the
  texts. The same texts in the same order give the same tokenizer.

  Raises:
    UserError: `size` is too small to hold every byte.
  """
  special = (*QWEN_TOKENS, *IMAGE_TOKENS)
  if size < 256 + len(special):
    raise UserError(f"a vocabulary of {size} cannot hold 256 bytes and {len(special)} special tokens; make it larger")
  backend = tokenizers.Tokenizer(models.BPE())
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size - len(special),
    min_frequency=1,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  unused = [f"<|unused_{i}|>" for i in range(size - len(special) - backend.get_vocab_size())]
  backend.add_special_tokens([_special(name) for name in (*unused, *special)])
  return Tokenizer(backend)
