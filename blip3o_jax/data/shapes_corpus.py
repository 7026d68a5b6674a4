"""Writes the corpora of the built-in world to disk, in the layouts of the release's data (spec 11.2).

  contrastive/  tar shards of NNNNNN.jpg + NNNNNN.txt: captions that say everything, and family captions; many things
                in colours without a name
  pretrain/     tar shards: two family captions to one that says everything, of things often in unnamed colours
  instruct/     tar shards: fewer, the six families in turn
  understanding/images/*.jpg, questions.jsonl   conversations, some without a picture
  understanding/heldout.jsonl                   questions about pictures never trained on
  understanding/heldout_combinations.jsonl      questions about pictures of held-out combinations
  tokenizer/    trained on the words of the world

Sample i of a set is a pure function of (seed, set, i).
"""

import functools
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from blip3o_jax.data import shapes, shapes_questions, tars, templates
from blip3o_jax.data.tokenizer import QWEN, train_tokenizer
from blip3o_jax.errors import UserError

VERSION = 9  # of what is drawn: another version is another corpus
MANIFEST = "manifest.json"
VOCABULARY = 640  # entries of the tokenizer, as in the preset "micro"


def make_shapes(
  out_dir,
  *,
  seed: int = 0,
  contrastive: int = 30_000,
  pretrain: int = 60_000,
  instruct: int = 4_000,
  understanding: int = 40_000,
  text_only: int = 40_000,
  held_out: int = 1_000,
  shard_size: int = 5_000,
) -> Path:
  """Write all corpora under `out_dir` and return it; the numbers are samples a set (0 leaves a set out).

  An identical corpus that is already there is left alone. Nothing appears under `out_dir` until all of it is written.

  Raises:
    UserError: `out_dir` holds something else.
  """
  out = Path(out_dir)
  sizes = {name: value for name, value in locals().items() if isinstance(value, int)}
  manifest = {"format": "blip3o-shapes", "version": VERSION} | sizes
  if (out / MANIFEST).is_file() and json.loads((out / MANIFEST).read_text()) == manifest:
    return out
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"{out} is not empty and holds another corpus; give another directory or remove it")
  temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    for name, count, sample in [
      ("contrastive", contrastive, _contrastive),
      ("pretrain", pretrain, _pretrain),
      ("instruct", instruct, _family_in_turn),
    ]:
      if count:
        make = lambda i, name=name, sample=sample: sample(_rng(seed, name, i), i)
        _write_shards(temporary / name, make, count, shard_size)
    if understanding or text_only or held_out:
      _write_understanding(temporary / "understanding", seed, understanding, text_only, held_out)
    train_tokenizer(tokenizer_texts(), VOCABULARY).save(temporary / "tokenizer")
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(temporary, out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return out


def _rng(seed: int, name: str, index: int) -> random.Random:
  return random.Random(f"{seed}/{name}/{index}")


# ---- pictures and captions


def _contrastive(rng: random.Random, index: int) -> tuple[shapes.Scene, str]:
  """Three captions of four say everything (two of them with places), one is that of a family. Where a caption has to
  name colours, all have a name; of the other things about half."""
  if index % 4 < 3:
    return _everything(rng, places=index % 4 < 2)
  family = rng.choice(shapes.FAMILIES)
  scene, caption = _family(rng, index, family)
  return scene if family in ("colors", "color_attr") else shapes.with_unnamed_colours(scene, rng), caption


def _pretrain(rng: random.Random, index: int) -> tuple[shapes.Scene, str]:
  """Short captions and long ones, as the paper has them: what is said of many things, and of things in any colour,
  keeps the few combinations of the short ones from being learnt by heart."""
  return _family(rng, index) if index % 3 else _everything(rng, places=index % 2 == 0)


def _everything(rng: random.Random, places: bool) -> tuple[shapes.Scene, str]:
  scene = shapes.sample_scene(rng, rng.choice((*shapes.FAMILIES, None, None, None, None)))
  scene = shapes.with_unnamed_colours(scene, rng)
  return scene, shapes.dense_caption(scene, places, ground=rng.random() < 0.75)


def _family(rng: random.Random, index: int, family: str | None = None) -> tuple[shapes.Scene, str]:
  del index
  family = family or rng.choice(shapes.FAMILIES)
  scene = shapes.sample_scene(rng, family)
  return scene, shapes.caption_of(scene, family, rng).text


def _family_in_turn(rng: random.Random, index: int) -> tuple[shapes.Scene, str]:
  return _family(rng, index, shapes.FAMILIES[index % len(shapes.FAMILIES)])


def encode_jpeg(pixels: np.ndarray) -> bytes:
  """uint8 [H, W, 3] -> JPEG, quality 95, 4:4:4."""
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
  return buffer.getvalue()


def _write_shards(folder: Path, sample: Callable[[int], tuple[shapes.Scene, str]], count: int, shard_size: int) -> None:
  def members(indices):
    for i in indices:
      scene, caption = sample(i)
      yield f"{i:06d}.jpg", encode_jpeg(shapes.render(scene))
      yield f"{i:06d}.txt", caption.encode()

  for number, start in enumerate(range(0, count, shard_size)):
    tars.write(folder / f"{number:06d}.tar", members(range(start, min(start + shard_size, count))))


# ---- understanding


def _write_understanding(folder: Path, seed: int, pictures: int, text_only: int, held_out: int) -> None:
  (folder / "images").mkdir(parents=True)

  def picture(name: str, scene: shapes.Scene) -> str:
    path = f"images/{name}.jpg"
    (folder / path).write_bytes(encode_jpeg(shapes.render(scene)))
    return path

  rows = []
  for i in range(pictures):
    rng = _rng(seed, "understanding", i)
    scene = shapes.sample_scene(rng, rng.choice((*shapes.FAMILIES, None, None, None, None)))
    turns = shapes_questions.about_picture(scene, rng, count=6)
    turns.insert(rng.randrange(len(turns) + 1), shapes_questions.description(scene, rng))
    rows.append(_row(turns, picture(f"{i:06d}", scene)))
  for i in range(text_only):
    rows.append(_row(shapes_questions.about_captions(_rng(seed, "text", i)), None))
  _write_rows(folder / "questions.jsonl", rows)

  for name, wanted in (("heldout", False), ("heldout_combinations", True)):
    rows = []
    for i in range(held_out):
      rng = _rng(seed, name, i)
      scene = shapes.sample_scene(rng, rng.choice((*shapes.FAMILIES, None, None, None, None)), held_out=wanted)
      turn = shapes_questions.about_picture(scene, rng, count=1, held_out=wanted)
      rows.append(_row(turn, picture(f"{name}_{i:06d}", scene)))
    _write_rows(folder / f"{name}.jsonl", rows)


@functools.cache
def tokenizer_texts() -> list[str]:
  """Every word of the built-in world and of the chat templates once, with a space in front where it has one, to train a
  tokenizer on: one that depends on the words alone, and so stays the same when what is asked about them changes."""
  rng = _rng(0, "tokenizer", 0)
  texts = {QWEN.message("system", templates.SYSTEM), "user\n", "assistant\n", templates.RECONSTRUCT}
  for _ in range(2000):
    scene = shapes.sample_scene(rng)
    turns = shapes_questions.about_picture(scene, rng, 6) + shapes_questions.about_captions(rng)
    for question, answer in [*turns, shapes_questions.description(scene, rng)]:
      texts |= {question, answer}
  texts |= {
    wording.format(caption=f"{number} circle") for wording in templates.WORDINGS.values() for number in shapes.NUMBERS
  }
  return sorted({word for text in texts for word in re.findall(r" ?[^\W\d_]+", text)})


def _row(turns: list[tuple[str, str]], image: str | None) -> dict:
  """One LLaVA-style conversation; the picture comes first in the first message."""
  conversation = []
  for i, (question, answer) in enumerate(turns):
    question = f"<image>\n{question}" if image and i == 0 else question
    conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
  return {"image": image, "conversations": conversation}


def _write_rows(path: Path, rows: list[dict]) -> None:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
