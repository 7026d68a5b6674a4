import io
import itertools
import json
import logging
import tarfile

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.data import pipeline, shapes_corpus
from blip3o_jax.data.pipeline import DataConfig, make_loader
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.data.vision import ImageProcessor
from blip3o_jax.errors import UserError

N = 20


def write(path, samples):
  with tarfile.open(path, "w") as tar:
    for i, (image, text) in enumerate(samples):
      for name, content in ((f"{i:03d}.png", image), (f"{i:03d}.txt", text.encode())):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def png(value):
  buffer = io.BytesIO()
  Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
  return buffer.getvalue()


@pytest.fixture
def numbered(tmp_path):
  """Twenty pictures whose red is their number."""
  write(tmp_path / "a.tar", [(png(i), f"caption {i}") for i in range(N)])
  return {"task": "images", "path": str(tmp_path), "image_size": 8}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  sizes = {"contrastive": 4, "pretrain": 6, "instruct": 0, "understanding": 6, "text_only": 6, "held_out": 2}
  return shapes_corpus.make_shapes(tmp_path_factory.mktemp("corpus") / "shapes", **sizes)


@pytest.fixture(scope="module")
def tokenizer(corpus):
  return load_tokenizer(corpus / "tokenizer")


def numbers(loader, steps):
  return [batch["pixels"][:, 0, 0, 0].tolist() for batch in itertools.islice(loader, steps)]


def test_each_epoch_goes_through_all_data_in_a_new_order(numbered):
  steps = numbers(make_loader(numbered, batch_size=4, seed=1), 15)
  epochs = [sum(steps[i : i + 5], []) for i in (0, 5, 10)]
  assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(N))
  assert numbers(make_loader(numbered, batch_size=4, seed=2), 15) != steps


def test_any_start_gives_the_same_batches(numbered):
  whole = numbers(make_loader(numbered, batch_size=6, seed=1), 12)
  for start in (1, 7):
    assert numbers(make_loader(numbered, batch_size=6, seed=1, start_step=start), 5) == whole[start : start + 5]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_take_consecutive_parts_of_the_same_batches(numbered, count):
  whole = numbers(make_loader(numbered, batch_size=6, seed=1), 8)
  parts = [
    numbers(make_loader(numbered, batch_size=6, seed=1, process_index=i, process_count=count), 8) for i in range(count)
  ]
  assert [sum(step, []) for step in zip(*parts, strict=True)] == whole


def test_threads_and_cache_change_nothing(numbered):
  whole = numbers(make_loader(numbered, batch_size=6, seed=1), 12)
  for change in ({"threads": 4, "prefetch": 3}, {"cache": True}):
    assert numbers(make_loader(numbered | change, batch_size=6, seed=1), 12) == whole


@pytest.mark.slow
def test_worker_processes_change_nothing(numbered):
  whole = numbers(make_loader(numbered, batch_size=6, seed=1), 12)
  assert numbers(make_loader(numbered | {"workers": 2}, batch_size=6, seed=1), 12) == whole


def test_a_bad_sample_is_replaced_by_the_same_one_everywhere(numbered, tmp_path, caplog):
  good = numbers(make_loader(numbered, batch_size=5, seed=1), 4)
  write(tmp_path / "a.tar", [(b"no image" if i == 7 else png(i), "x") for i in range(N)])
  with caplog.at_level(logging.WARNING):
    bad = numbers(make_loader(numbered, batch_size=5, seed=1), 4)
  assert "a.tar: 007" in caplog.text
  changed = [(g, b) for g, b in zip(sum(good, []), sum(bad, []), strict=True) if g != b]
  assert len(changed) == 1 and changed[0][0] == 7 and changed[0][1] != 7
  again = numbers(make_loader(numbered, batch_size=5, seed=1, start_step=2), 2)
  assert again == bad[2:]


def test_only_bad_samples_is_an_error(numbered, tmp_path):
  write(tmp_path / "a.tar", [(b"no image", "x") for _ in range(N)])
  with pytest.raises(UserError, match="in a row are bad"):
    next(make_loader(numbered, batch_size=5, seed=1))


def test_captions(corpus, tokenizer):
  cfg = {"task": "captions", "path": str(corpus / "contrastive"), "max_length": 24}
  batch = next(make_loader(cfg, batch_size=4, seed=0, tokenizer=tokenizer))
  assert batch["pixels"].shape == (4, 64, 64, 3) and batch["pixels"].dtype == np.uint8
  assert batch["tokens"].shape == (4, 24) and batch["tokens"].dtype == np.int32 and batch["token_mask"].dtype == bool
  for tokens, mask in zip(batch["tokens"], batch["token_mask"], strict=True):
    assert (tokens[~mask] == tokenizer.pad).all() and mask[0] and (np.diff(mask.astype(int)) <= 0).all()
    assert tokenizer.encode(tokenizer.decode(tokens[mask])) == tokens[mask].tolist()


def test_generation(corpus, tokenizer):
  cfg = {"task": "generation", "path": str(corpus / "pretrain"), "max_length": 44}
  batch = next(make_loader(cfg, batch_size=6, seed=0, tokenizer=tokenizer))
  length = batch["token_mask"].sum(axis=1)
  assert (batch["tokens"][np.arange(6), length - 1] == tokenizer.image_start).all()
  assert batch["positions"].shape == (6, 3, 44) and batch["positions"].dtype == np.int32
  want = np.where(batch["token_mask"], np.arange(44), 0)
  assert all((batch["positions"][:, axis] == want).all() for axis in range(3))
  trained = next(make_loader(cfg | {"form": "training"}, batch_size=6, seed=0, tokenizer=tokenizer))
  assert (trained["token_mask"].sum(axis=1) == np.minimum(length + 2, 44)).all()


def test_conversations(corpus, tokenizer):
  cfg = {
    "task": "conversations",
    "path": str(corpus / "understanding/questions.jsonl"),
    "max_length": 208,
    "max_patches": 64,
  }
  processor = ImageProcessor(patch_size=8)
  batch = next(make_loader(cfg, batch_size=12, seed=0, tokenizer=tokenizer, processor=processor, window_size=32))
  assert {key: value.shape[1:] for key, value in batch.items()} == {
    "tokens": (208,),
    "token_mask": (208,),
    "labels": (208,),
    "positions": (3, 208),
    "patches": (64, 384),
    "patch_pos": (64, 2),
    "patch_image": (64,),
    "patch_window": (64,),
    "grid_thw": (1, 3),
  }
  pads = (batch["tokens"] == tokenizer.image_pad).sum(axis=1)
  assert sorted(pads.tolist()) == [0] * 6 + [16] * 6
  assert ((batch["patch_image"] == 0).sum(axis=1) == 4 * pads).all()
  said = batch["labels"] != -100
  assert (batch["labels"] == batch["tokens"])[said].all() and not said[~batch["token_mask"]].any()
  rows = [json.loads(line) for line in (corpus / "understanding/questions.jsonl").read_text().splitlines()]
  answers = {"".join(m["value"] + "<|im_end|>" for m in row["conversations"] if m["from"] == "gpt") for row in rows}
  found = {
    tokenizer.decode(tokens[mask], skip_special=False) for tokens, mask in zip(batch["tokens"], said, strict=True)
  }
  assert found == answers
  for positions, mask in zip(batch["positions"][pads > 0], batch["token_mask"][pads > 0], strict=True):
    first = positions[:, 15:19]  # the picture begins here: 4 x 4 merged patches
    assert positions[:, mask].max() < mask.sum() - 1 and (np.ptp(first, axis=0) >= 0).all()
    assert (positions[0, mask] != positions[2, mask]).any()


def test_too_long_a_conversation_is_cut_and_one_without_answers_is_bad(tmp_path, tokenizer):
  row = {"image": None, "conversations": [{"from": "human", "value": "a " * 50}, {"from": "gpt", "value": "no"}]}
  (tmp_path / "rows.jsonl").write_text(json.dumps(row))
  cfg = DataConfig("conversations", "", max_length=64, max_patches=4)
  record = pipeline.open_source(tmp_path / "rows.jsonl")[0]
  with pytest.raises(UserError, match="no answer within 64"):
    pipeline.make_builder(cfg, tokenizer, ImageProcessor())(record)
  sample = pipeline.make_builder(
    DataConfig("conversations", "", max_length=80, max_patches=4), tokenizer, ImageProcessor()
  )
  assert sample(record)["token_mask"].sum() <= 80


def test_errors(numbered, tokenizer):
  with pytest.raises(UserError, match="does not divide"):
    make_loader(numbered, batch_size=5, seed=0, process_count=2)
  with pytest.raises(UserError, match="unknown keys sise"):
    make_loader(numbered | {"sise": 3}, batch_size=5, seed=0)
  with pytest.raises(UserError, match="lacks path"):
    make_loader({"task": "images"}, batch_size=5, seed=0)
  with pytest.raises(UserError, match="task 'x' is unknown"):
    make_loader(numbered | {"task": "x"}, batch_size=5, seed=0)
  with pytest.raises(UserError, match="needs a tokenizer"):
    make_loader(numbered | {"task": "captions"}, batch_size=5, seed=0)
  with pytest.raises(UserError, match="image processor"):
    make_loader(numbered | {"task": "conversations"}, batch_size=5, seed=0, tokenizer=tokenizer)
