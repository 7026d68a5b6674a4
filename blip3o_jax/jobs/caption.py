"""`blip3o data caption`: captions of pictures by the model's own chat, as the paper had its pretraining data captioned
by its own backbone (spec 11.2): about 120 tokens of the long style, about 20 of the short.

Writes tar shards that pretraining reads, OUT/shards/000012.tar with KEY.jpg and KEY.txt: the pictures are the very
bytes that came in. Sharded over processes and resumable by shard (jobs.parts).
"""

import collections
import functools
import io
import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from blip3o_jax.data import tars, transforms
from blip3o_jax.data.outputs import remove_stale, writable_folder
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import UserError
from blip3o_jax.inference.model import Model, load_here
from blip3o_jax.jobs.parts import Parts, Progress, closing

STYLES = {  # what is asked, and the tokens that an answer may have
  "long": ("Provide a detailed description of the given image.", 256),  # the release's own words (spec part 8)
  "short": ("Describe the given image in one short sentence.", 48),
}
_SHARD = 1024  # pictures of a shard, which is what a kill can cost
_Captioned = tuple[bytes, str] | str  # a picture and its caption, or why there is none


def run(
  model_name: str | Path,
  data: str | Path,
  out: str | Path,
  *,
  style: str = "long",
  prompt: str | None = None,
  batch_size: int | None = None,
  fsdp: int = 1,
  compile_cache: str | Path | None = None,
) -> str:
  """Caption every picture of a source; returns a line that says where.

  Args:
    data: whatever data.sources.open_source takes, shards of pictures alone too; captions are not looked at.
    style: of STYLES. prompt: ask this instead. fsdp: devices over which the weights are cut.

  Raises:
    UserError: unknown style, or `out` holds another job; at the end, if some pictures could not be captioned.
  """
  if style not in STYLES:
    raise UserError(f"style {style!r} is unknown; choose one of {', '.join(STYLES)}")
  source, out = open_source(data, captions=False), writable_folder(out)
  model = load_here(model_name, fsdp=fsdp, compile_cache=compile_cache)
  words, tokens = STYLES[style]
  asked = prompt or words
  facts = {"data": os.fspath(data), "model": model.digest, "prompt": asked, "max_new_tokens": tokens}
  parts, size = Parts(out, len(source), facts, largest=_SHARD), model.rounded(batch_size or model.batch_size)
  _caption_all(model, source, parts, asked, model.talk_settings(max_new_tokens=tokens), size)
  return closing(parts, "pictures")


def _caption_all(model: Model, source, parts: Parts, asked: str, sampling, size: int) -> None:
  todo, done = collections.deque(parts.unfinished()), dict[int, _Captioned]()
  progress = Progress(sum(map(len, todo)), "pictures")
  order = list(itertools.chain(*todo))  # a batch may hold several parts, which are small where pictures are few
  batches = [order[i : i + size] for i in range(0, len(order), size)]
  read = functools.partial(_read, model, source, asked)
  with ThreadPoolExecutor(1, "read") as reader:  # the next batch is read while this one is captioned
    ahead = [reader.submit(read, inputs) for inputs in batches[:1]]
    for i, inputs in enumerate(batches):
      samples, bad = ahead.pop().result()
      ahead += [reader.submit(read, later) for later in batches[i + 1 : i + 2]]
      captions = model.reply([row for *_, row in samples], sampling, size=size)
      done |= bad
      for (index, content, _), caption in zip(samples, captions, strict=True):
        done[index] = (content, caption) if caption else _told(f"picture {index} was given no words")
      progress.add(len(inputs))
      while todo and todo[0][-1] in done:
        part = todo.popleft()
        _write(parts, part, [(index, done.pop(index)) for index in part])


def _write(parts: Parts, part: range, captioned: Sequence[tuple[int, _Captioned]]) -> None:
  """The shard of a part, if any of its pictures has a caption, and its records."""
  path, members, records = parts.out / "shards" / f"{part.start // parts.size:06d}.tar", [], []
  for index, one in captioned:
    if isinstance(one, str):
      records.append({"row": index, "error": one})
      continue
    key, (content, caption) = f"{index:09d}", one
    members += [(f"{key}.{_extension(content)}", content), (f"{key}.txt", caption.encode())]
    records.append({"row": index, "file": path.name, "key": key, "caption": caption})
  remove_stale([path])
  if members:
    tars.write(path, members)
  parts.finish(part, records)


def _read(model: Model, source, asked: str, inputs: Sequence[int]):
  """(number, bytes, row to answer) of the pictures that can be read, and what is wrong with those that cannot."""
  samples, bad = [], dict[int, str]()
  for index in inputs:
    try:
      record = source[index]
      if record["image"] is None:
        raise UserError(f"{record['name']} has no picture")
      picture = transforms.decode(record["image"], record["name"])
      row = model.prompts.to_answer([{"role": "user", "content": [picture, asked]}])
      samples.append((index, record["image"], row))
    except UserError as error:
      bad[index] = _told(str(error))
  return samples, bad


def _extension(content: bytes) -> str:
  """One that tar sources know; decoders look at the content."""
  return {"PNG": "png", "WEBP": "webp"}.get(Image.open(io.BytesIO(content)).format, "jpg")


def _told(error: str) -> str:
  print(f"blip3o: {error}", file=sys.stderr, flush=True)
  return error
