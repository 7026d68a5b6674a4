import collections
import dataclasses
import errno
import io
import itertools
import json
import logging
import multiprocessing
import os

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.data import files, pipeline, shapes_corpus, tars, templates
from blip3o_jax.data.pictures import QwenPictures, SiglipPictures
from blip3o_jax.data.pipeline import DataConfig, make_loader
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.data.vision import ImageProcessor
from blip3o_jax.errors import UserError

N = 20


def write(path, samples):
  """`samples` are (picture, caption), bytes or text."""
  members = []
  for i, (image, text) in enumerate(samples):
    members += [(f"{i:03d}.png", image), (f"{i:03d}.txt", text.encode() if isinstance(text, str) else text)]
  tars.write(path, members)


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
  found = [batch["pixels"][:, 0, 0, 0].tolist() for batch in itertools.islice(loader, steps)]
  loader.close()  # it reads ahead, also what the next lines of a test write anew
  return found


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
  for workers, rows in ((1, 6), (2, 6), (3, 6)):
    loader = make_loader(numbered | {"workers": workers, "prefetch": 8}, batch_size=rows, seed=1)
    assert numbers(loader, 12) == whole
  assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_process_that_is_killed_changes_nothing(numbered, caplog):
  whole = numbers(make_loader(numbered, batch_size=6, seed=1), 12)
  loader = make_loader(numbered | {"workers": 1, "prefetch": 1}, batch_size=6, seed=1)
  first = [next(loader)["pixels"][:, 0, 0, 0].tolist() for _ in range(3)]
  (worker,) = multiprocessing.active_children()
  worker.kill()
  assert first + numbers(loader, 9) == whole and "new worker processes" in caplog.text


def test_worker_processes_that_die_are_replaced_but_not_for_ever():
  class Dying(list):
    """A loader that ends with an error, and once closed not at all."""

    error = RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

    def __iter__(self):
      yield from super().__iter__()
      raise self.error

  started = []
  batches = pipeline.Batches(lambda step: started.append(step) or Dying(range(step, min(step + 2, 7))), 3)
  assert list(itertools.islice(batches, 4)) == [3, 4, 5, 6] and started == [3, 5]
  with pytest.raises(UserError, match=r"die again and again.*fewer data.workers \(.*exit code -9"):
    next(batches)
  assert started == [3, 5, 7, 7, 7]
  Dying.error = RuntimeError("a mistake of ours")
  with pytest.raises(RuntimeError, match="a mistake of ours"):
    next(pipeline.Batches(lambda step: Dying(), 0))


def test_a_bad_sample_is_replaced_by_the_same_one_everywhere(numbered, tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(pipeline, "_warned", 0)
  good = numbers(make_loader(numbered, batch_size=5, seed=1), 4)
  write(tmp_path / "a.tar", [(b"no image" if i == 7 else png(i), "x") for i in range(N)])
  with caplog.at_level(logging.WARNING):
    bad = numbers(make_loader(numbered, batch_size=5, seed=1), 4)
  assert "a.tar: 007" in caplog.text
  changed = [(g, b) for g, b in zip(sum(good, []), sum(bad, []), strict=True) if g != b]
  assert len(changed) == 1 and changed[0][0] == 7 and changed[0][1] != 7
  loader = make_loader(numbered, batch_size=5, seed=1)
  assert sum(batch["replaced"].sum() for batch in itertools.islice(loader, 4)) == 1
  again = numbers(make_loader(numbered, batch_size=5, seed=1, start_step=2), 2)
  assert again == bad[2:]


def test_only_bad_samples_is_an_error(numbered, tmp_path):
  write(tmp_path / "a.tar", [(b"no image", "x") for _ in range(N)])
  with pytest.raises(UserError, match="in a row are bad"):
    next(make_loader(numbered, batch_size=5, seed=1))


def test_pictures_alone_are_enough_where_captions_are_not_read(numbered, tmp_path, tokenizer):
  whole = numbers(make_loader(numbered, batch_size=5, seed=1), 4)
  tars.write(tmp_path / "a.tar", [(f"{i:03d}.png", png(i)) for i in range(N)])
  assert numbers(make_loader(numbered, batch_size=5, seed=1), 4) == whole
  with pytest.raises(UserError, match="a.tar holds pictures without captions"):
    make_loader(numbered | {"task": "captions"}, batch_size=5, seed=1, tokenizer=tokenizer)


def test_a_passing_trouble_of_the_disk_changes_nothing(numbered, monkeypatch):
  whole = numbers(make_loader(numbered, batch_size=5, seed=1), 4)
  monkeypatch.setattr(files, "_WAITS", (0.0,))
  pread, failed = os.pread, set()

  def at_second_try(handle, size, offset):
    if offset not in failed:
      failed.add(offset)
      raise OSError(errno.EIO, "Input/output error")
    return pread(handle, size, offset)

  monkeypatch.setattr(os, "pread", at_second_try)
  assert numbers(make_loader(numbered, batch_size=5, seed=1), 4) == whole
  assert len(failed) == N


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
  pictures = QwenPictures(ImageProcessor(patch_size=8), tokenizer.encode("<|image_pad|>")[0], window_size=32)
  batch = next(make_loader(cfg, batch_size=12, seed=0, tokenizer=tokenizer, pictures=pictures))
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
    "cut": (),
    "replaced": (),
  }
  pads = (batch["tokens"] == pictures.image_token).sum(axis=1)
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


def test_conversations_for_siglip(corpus, tokenizer):
  """Spec 8: a square of one size, all of its tokens between [IMG] and [/IMG], plain positions; cut rows are bad."""
  cfg = {"task": "conversations", "path": str(corpus / "understanding/questions.jsonl"), "max_length": 96}
  pictures = SiglipPictures(size=8, count=4, image_token=tokenizer.encode("<image>")[0])
  batch = next(make_loader(cfg, batch_size=12, seed=0, tokenizer=tokenizer, pictures=pictures))
  assert batch["images"].shape == (12, 1, 8, 8, 3) and batch["images"].dtype == np.uint8
  count = (batch["tokens"] == pictures.image_token).sum(axis=1)
  assert sorted(count.tolist()) == [0] * 6 + [4] * 6
  np.testing.assert_array_equal(batch["images"].any(axis=(1, 2, 3, 4)), count > 0)
  text = tokenizer.decode(batch["tokens"][np.argmax(count)], skip_special=False)
  assert "user\n[IMG]<image><image><image><image>[/IMG]" in text
  assert (batch["positions"] == np.where(batch["token_mask"], np.arange(96), 0)[:, None]).all()
  record = next(r for r in map(open_source(cfg["path"]).__getitem__, range(12)) if r["image"])
  long = pipeline.make_builder(
    DataConfig(**cfg | {"max_length": 200}), tokenizer, dataclasses.replace(pictures, count=300)
  )
  with pytest.raises(UserError, match="no answer within 200"):
    long(record)


def test_too_long_a_conversation_is_cut_and_one_without_answers_is_bad(tmp_path, tokenizer):
  row = {"image": None, "conversations": [{"from": "human", "value": "a " * 50}, {"from": "gpt", "value": "no"}]}
  (tmp_path / "rows.jsonl").write_text(json.dumps(row))
  cfg = DataConfig("conversations", "", max_length=64, max_patches=4)
  record, pictures = open_source(tmp_path / "rows.jsonl")[0], QwenPictures(ImageProcessor(), 635)
  with pytest.raises(UserError, match="no answer within 64"):
    pipeline.make_builder(cfg, tokenizer, pictures)(record)
  sample = pipeline.make_builder(dataclasses.replace(cfg, max_length=80), tokenizer, pictures)
  assert sample(record)["token_mask"].sum() <= 80


MALFORMED = [
  ([["human", "<image>\n?"], ["gpt", None]], "human and gpt messages in turn, all text"),
  ([["human", "<image>\n?"], ["gpt", 3]], "human and gpt messages in turn, all text"),
  ([["human", "<image>\n?"]], "human and gpt messages in turn, all text"),
  ([], "human and gpt messages in turn, all text"),
  ([["human", "<image>\n\ud83d"], ["gpt", "no"]], "no valid Unicode"),
  ([["human", "no place"], ["gpt", "no"]], "1 pictures but 0 <image>"),
  ([["human", "<image>\n<|image_pad|>"], ["gpt", "no"]], "row 0 has 17 image tokens"),
]


@pytest.mark.parametrize("messages, why", MALFORMED)
def test_malformed_conversations_are_told_by_name(tmp_path, tokenizer, messages, why):
  (tmp_path / "0.png").write_bytes(png(0))
  row = {"image": "0.png", "conversations": [{"from": role, "value": value} for role, value in messages]}
  (tmp_path / "rows.jsonl").write_text(json.dumps(row))
  pictures = QwenPictures(ImageProcessor(patch_size=8, min_pixels=4096), tokenizer.encode("<|image_pad|>")[0])
  build = pipeline.make_builder(DataConfig("conversations", max_length=96, max_patches=64), tokenizer, pictures)
  with pytest.raises(UserError, match=f"rows.jsonl: line 1: .*{why}") as error:
    build(open_source(tmp_path / "rows.jsonl")[0])
  assert str(error.value).count("rows.jsonl") == 1


def test_pictures_that_do_not_fit_are_told_by_name(tmp_path, tokenizer):
  buffer = io.BytesIO()
  Image.new("RGB", (3000, 10)).save(buffer, "PNG")
  tars.write(tmp_path / "a.tar", [("thin.png", buffer.getvalue()), ("wide.png", png(0))])
  source = open_source(tmp_path / "a.tar", captions=False)
  with pytest.raises(UserError, match="a.tar: thin: a picture of 3000 x 10 is too long and thin"):
    pipeline.make_builder(DataConfig("images"))(source[0])
  asked = {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "no"}]}
  build = pipeline.make_builder(
    DataConfig("conversations", max_patches=4), tokenizer, QwenPictures(ImageProcessor(), 635)
  )
  for i, why in enumerate(("thin: an image of 3000 x 10 is too long", "wide: row 0 has 1 images with 16 patches")):
    with pytest.raises(UserError, match=f"a.tar: {why}"):
      build(source[i] | asked)


@pytest.fixture
def several(tmp_path):
  """Three sources of one task: red is the number of the sample, blue that of the source."""
  sources = {}
  for blue, (name, n) in enumerate((("long", 24), ("short", 12), ("journeydb", 8))):
    pictures = [io.BytesIO() for _ in range(n)]
    for red, file in enumerate(pictures):
      Image.new("RGB", (8, 8), (red, 0, blue)).save(file, "PNG")
    write(tmp_path / f"{name}.tar", [(file.getvalue(), "a") for file in pictures])
    sources[name] = {"path": str(tmp_path / f"{name}.tar")}
  return {"task": "images", "sources": sources, "image_size": 8}


def ids(batch):
  """Which sample each row is, as (source, number)."""
  return [(int(blue), int(red)) for red, _, blue in batch["pixels"][:, 0, 0]]


def test_a_mixture_holds_its_shares_in_every_batch(several):
  for name, weight in (("long", 3), ("short", 2), ("journeydb", 1)):
    several["sources"][name]["weight"] = weight
  for batch in itertools.islice(make_loader(several, batch_size=12, seed=4), 6):
    found = [blue for blue, _ in ids(batch)]
    assert [found.count(blue) for blue in range(3)] == [6, 4, 2]


def test_a_mixture_goes_on_after_any_step_on_any_number_of_processes(several):
  whole = [ids(batch) for batch in itertools.islice(make_loader(several, batch_size=12, seed=4), 9)]
  for start, count in ((4, 1), (4, 2), (7, 3)):
    parts = [
      make_loader(several, batch_size=12, seed=4, start_step=start, process_index=i, process_count=count)
      for i in range(count)
    ]
    rows = [[ids(batch) for batch in itertools.islice(part, 2)] for part in parts]
    assert [sum(step, []) for step in zip(*rows, strict=True)] == whole[start : start + 2]
    first = [row for part in rows for row in part[0]]
    assert len(set(first)) == len(first)  # no two processes have the same sample


def test_a_replacement_comes_from_the_same_source(several, tmp_path):
  write(tmp_path / "short.tar", [(b"no image", "a")] + [(png(i), "a") for i in range(1, 12)])  # blue 0 now
  batches = list(itertools.islice(make_loader(several, batch_size=44, seed=4), 1))
  assert batches[0]["replaced"].sum() == 1
  found = collections.Counter(blue for blue, _ in ids(batches[0]))
  assert found == {0: 36, 2: 8}


def test_groups_are_tasks_side_by_side_with_fixed_rows(several, corpus, tokenizer):
  draw = {"task": "generation", "path": str(corpus / "pretrain"), "max_length": 44, "rows": 2}
  see = {"task": "conversations", "path": str(corpus / "understanding/questions.jsonl")}
  see |= {"max_length": 208, "max_patches": 64}
  pictures = QwenPictures(ImageProcessor(patch_size=8), tokenizer.encode("<|image_pad|>")[0], window_size=32)
  settings = dict(batch_size=6, seed=2, tokenizer=tokenizer, pictures=pictures)
  cfg = {"groups": {"generation": draw, "understanding": see}}
  whole = list(itertools.islice(make_loader(cfg, **settings), 4))
  assert whole[0]["generation"]["tokens"].shape == (4, 44) and whole[0]["understanding"]["tokens"].shape == (2, 208)
  halves = [
    list(itertools.islice(make_loader(cfg, process_index=i, process_count=2, start_step=1, **settings), 3))
    for i in range(2)
  ]
  for name in ("generation", "understanding"):
    for step in range(3):
      both = np.concatenate([half[step][name]["tokens"] for half in halves])
      np.testing.assert_array_equal(both, whole[step + 1][name]["tokens"])
  # Alone a task sees what it sees here: the others do not disturb it.
  alone = make_loader({k: v for k, v in draw.items() if k != "rows"}, **(settings | {"batch_size": 4}))
  np.testing.assert_array_equal(next(alone)["tokens"], whole[0]["generation"]["tokens"])
  twice = make_loader({"groups": {"a": draw, "b": draw}}, **(settings | {"batch_size": 8}))
  batch = next(twice)
  assert (batch["a"]["tokens"] != batch["b"]["tokens"]).any()  # of one source, but not in one order
  with pytest.raises(UserError, match="over 2 processes in groups of 2 : 1; take 6 or 12"):
    make_loader(cfg, process_count=2, **(settings | {"batch_size": 8}))
  with pytest.raises(UserError, match="holds task beside them"):
    make_loader(cfg | {"task": "images"}, **settings)
  with pytest.raises(UserError, match=r"data.groups.see config has unknown keys sise"):
    make_loader({"groups": {"see": see | {"sise": 1}}}, **settings)


def test_a_caption_of_ten_thousand_tokens_is_cut_and_counted(tmp_path, tokenizer):
  write(tmp_path / "a.tar", [(png(0), "a red circle " * 5000), (png(1), "a circle")])
  cfg = {"task": "generation", "path": str(tmp_path), "image_size": 8, "max_length": 40}
  batch = next(make_loader(cfg, batch_size=2, seed=0, tokenizer=tokenizer))
  long, short = np.argsort(batch["pixels"][:, 0, 0, 0])
  whole = templates.generation_prompt(tokenizer, ("a red circle " * 5000).strip())
  assert len(whole) > 10_000 and batch["cut"][[long, short]].tolist() == [len(whole) - 40, 0]
  assert batch["tokens"][long].tolist() == [*whole[:39], tokenizer.image_start] and batch["token_mask"][long].all()


@pytest.mark.parametrize(
  "text, message",
  [(b"\xff\xfe", "not UTF-8"), (b" \n", "an empty caption"), (b"\x00", None), (b"\xf0\x9f\xa6\x8a", None)],
)
def test_captions_that_cannot_be_used_are_replaced(tmp_path, tokenizer, text, message, caplog, monkeypatch):
  write(tmp_path / "a.tar", [(png(0), text), (png(1), "a circle")])
  cfg = {"task": "captions", "path": str(tmp_path), "image_size": 8, "max_length": 40}
  monkeypatch.setattr(pipeline, "_warned", 0)
  batch = next(make_loader(cfg, batch_size=2, seed=0, tokenizer=tokenizer))
  assert batch["replaced"].sum() == (message is not None)
  assert message is None or message in caplog.text


def test_a_shard_damaged_in_the_middle_of_a_run_is_passed_over_and_counted(several, tmp_path):
  loader = make_loader(several | {"threads": 1, "prefetch": 1}, batch_size=11, seed=4)
  assert not next(loader)["replaced"].any()
  (tmp_path / "journeydb.tar").unlink()  # 8 of 44 samples
  with open(tmp_path / "short.tar", "r+b") as shard:  # 12 of 44
    shard.truncate(6000)
  with pytest.raises(UserError, match="in a row are bad.*journeydb.tar cannot be read"):
    for _ in range(8):
      next(loader)


def test_a_damaged_shard_of_a_source_gives_the_same_batches_everywhere(numbered, tmp_path):
  write(tmp_path / "b.tar", [(png(i), "a") for i in range(N, 2 * N)])
  loader = make_loader(numbered | {"threads": 1, "prefetch": 1}, batch_size=10, seed=4)
  next(loader)
  content = bytearray((tmp_path / "b.tar").read_bytes())
  content[:] = bytes(len(content))
  (tmp_path / "b.tar").write_bytes(content)
  later = list(itertools.islice(loader, 2, 8))
  assert all(batch["pixels"][:, 0, 0, 0].max() < N for batch in later)
  replaced = sum(int(batch["replaced"].sum()) for batch in later)
  assert 20 <= replaced <= 40  # half of six batches, give or take what an epoch's end does


def test_fewer_samples_than_a_batch_takes(several):
  with pytest.raises(UserError, match="long has 24 samples, a batch takes 25"):
    make_loader(several, batch_size=46, seed=0)
  several["sources"]["journeydb"]["weight"] = 1000
  with pytest.raises(UserError, match="journeydb has 8 samples, a batch takes 15"):
    make_loader(several, batch_size=16, seed=0)


def test_errors(numbered, tokenizer):
  with pytest.raises(UserError, match="does not divide"):
    make_loader(numbered, batch_size=5, seed=0, process_count=2)
  with pytest.raises(UserError, match="unknown keys sise"):
    make_loader(numbered | {"sise": 3}, batch_size=5, seed=0)
  with pytest.raises(UserError, match="needs a task, and either a path or sources; it has task"):
    make_loader({"task": "images"}, batch_size=5, seed=0)
  with pytest.raises(UserError, match="task 'x' is unknown"):
    make_loader(numbered | {"task": "x"}, batch_size=5, seed=0)
  for change, why in [
    ({"rows": 0}, "data.rows is 0; take a whole number from 1 on"),
    ({"rows": -1}, "data.rows is -1"),
    ({"image_size": 0}, "data.image_size is 0"),
    ({"max_length": 0}, "data.max_length is 0"),
    ({"workers": -1}, "data.workers is -1; take a whole number from 0 on"),
    ({"threads": -1}, "data.threads is -1"),
    ({"resize": "stretch"}, "data.resize 'stretch' is unknown; choose one of crop, squash"),
    ({"form": "x"}, "data.form 'x' is unknown"),
    ({"wording": "x"}, "data.wording 'x' is unknown"),
    ({"path": "", "sources": {"a": {"weight": 1}}}, "data.sources.a config needs a path"),
    ({"path": "", "sources": {"a": "data/a"}}, "data.sources.a config is 'data/a'; give its fields: "),
    ({"path": "", "sources": ["data/a"]}, r"data.sources is \['data/a'\]; give the fields of each source by its name"),
    ({"path": 3}, "data path 3 is none; give a path"),
    ({"path": ("a", 3)}, r"data path \('a', 3\) is none; give a path"),
    ({"buckets": 64}, "data.buckets is 64; give a list of lengths"),
    ({"buckets": ("a",)}, "data.buckets is .*; give a list of lengths"),
  ]:
    with pytest.raises(UserError, match=why):
      make_loader(numbered | change, batch_size=5, seed=0)
  for seed in (-1, 1.5):
    with pytest.raises(UserError, match=f"seed is {seed}; the order of the data takes a whole number"):
      make_loader(numbered, batch_size=5, seed=seed)
  for groups in ({}, ["a"]):
    with pytest.raises(UserError, match="data.groups is .*; give the fields of each group by its name"):
      make_loader({"groups": groups}, batch_size=5, seed=0)
  with pytest.raises(UserError, match="needs a tokenizer"):
    make_loader(numbered | {"task": "captions"}, batch_size=5, seed=0)
  asked = numbered | {"task": "conversations"}
  with pytest.raises(UserError, match="needs a backbone that sees pictures"):
    make_loader(asked, batch_size=5, seed=0, tokenizer=tokenizer)
  with pytest.raises(UserError, match="needs max_patches"):
    make_loader(asked, batch_size=5, seed=0, tokenizer=tokenizer, pictures=QwenPictures(ImageProcessor(), 635))
