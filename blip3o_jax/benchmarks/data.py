"""`blip3o bench data`: how fast samples come, against a plain loop over the same pictures; and cached features.

The plain loop is what anybody would write: a process opens JPEG files one after the other, decodes, resizes and crops
them with Pillow. The pipeline makes the same pixels up to a rounding, resizing only what the crop keeps, and shuffles,
checks, batches and moves arrays between processes as well. Both get the same number of processes; they take turns, and
the median of each is told.
"""

import functools
import io
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from blip3o_jax import benchmarks
from blip3o_jax.data import pipeline, tars
from blip3o_jax.data.features import Manifest, pack, write_shard
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.porting.locate import find

SIZE = 448  # what the encoder sees
_BATCH = 16
_WARM = 64  # pictures before the clock starts


def run(
  out: str | Path | None = None, *, pictures: int = 300, processes: int = 2, seconds: float = 8.0, rounds: int = 3
) -> Iterator[str]:
  """Lines to print; `out` gets the same as JSON.

  Args:
    pictures: how many JPEGs of 640 to 1024 pixels to render.
    processes: measured with one and with so many.
    seconds, rounds: each measurement's time, and how many of them.
  """
  measured = []
  with tempfile.TemporaryDirectory() as folder:
    files = _render(Path(folder), pictures)
    for count in sorted({1, processes}):
      plain = functools.partial(_plain_rate, files, count, seconds)
      ours = functools.partial(_pipeline_rate, Path(folder), count, seconds)
      rates = [(plain(), ours()) for _ in range(rounds)]
      loop, grain = (statistics.median(column) for column in zip(*rates, strict=True))
      row = {"processes": count, "plain": loop, "ours": grain, "share": grain / loop, "rounds": rates}
      measured.append(row)
      yield (
        f"{count} {'process' if count == 1 else 'processes'}: plain loop {row['plain']:.1f} pictures/s, pipeline "
        f"{row['ours']:.1f}, {row['share']:.1%} of it (medians of {rounds} times {seconds:.0f} s)"
      )
    rates = [_features_rate(Path(folder), seconds) for _ in range(rounds)]
    features = statistics.median(rates)
    yield f"1 process: cached features [64, 1792] with their prompts, {features:.1f} samples/s (median of {rounds})"
  benchmarks.report(out, {"pictures": pictures, "seconds": seconds, "rows": measured, "features": rates})
  if out:
    yield str(out)


def _render(folder: Path, count: int) -> list[Path]:
  """JPEGs of varied content, as files and as one tar of the pretraining layout."""
  files, members = [folder / f"{i:05d}.jpg" for i in range(count)], []
  for i, file in enumerate(files):
    content = picture(i)
    file.write_bytes(content)
    members += [(file.name, content), (f"{file.stem}.txt", b"a picture")]
  tars.write(folder / "pictures.tar", members)
  return files


def picture(seed: int) -> bytes:
  """A JPEG, quality 90, 640 to 1024 pixels on the longer side: clouds at several scales, ellipses, fine grain."""
  rng = np.random.default_rng(seed)
  long, ratio = int(rng.integers(640, 1025)), rng.choice([3 / 4, 2 / 3, 9 / 16, 1.0])
  size = (long, round(long * ratio)) if rng.random() < 0.6 else (round(long * ratio), long)
  canvas = np.zeros((size[1], size[0], 3), np.float32)
  for scale, weight in ((2, 0.1), (8, 0.2), (64, 0.7)):
    coarse = rng.integers(0, 256, (size[1] // scale, size[0] // scale, 3), np.uint8)
    canvas += weight * np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32)
  image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
  draw = ImageDraw.Draw(image)
  for _ in range(20):
    x, y, a, b = (int(v) for v in rng.integers(0, long, 4))
    draw.ellipse((x, y, x + a // 4, y + b // 4), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=90)
  return buffer.getvalue()


def _plain(file: Path) -> np.ndarray:
  image = Image.open(file).convert("RGB")
  short = min(image.size)
  width, height = (int(SIZE * side / short) for side in image.size)
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
  return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def _plain_process(files: list[Path], seconds: float, start, done) -> None:
  forever = itertools.cycle(files)
  for file in itertools.islice(forever, 8):
    _plain(file)
  start.wait()
  begin, count = time.perf_counter(), 0
  while time.perf_counter() - begin < seconds:
    _plain(next(forever))
    count += 1
  done.put(count / (time.perf_counter() - begin))


def _plain_rate(files: list[Path], processes: int, seconds: float) -> float:
  context = multiprocessing.get_context("spawn")
  start, done = context.Barrier(processes), context.Queue()
  workers = [
    context.Process(target=_plain_process, args=(files[i::processes], seconds, start, done)) for i in range(processes)
  ]
  for worker in workers:
    worker.start()
  rate = sum(done.get(timeout=120 + seconds) for _ in workers)
  for worker in workers:
    worker.join()
  return rate


def _pipeline_rate(folder: Path, processes: int, seconds: float) -> float:
  cfg = {"task": "images", "path": str(folder / "pictures.tar"), "image_size": SIZE}
  loader = pipeline.make_loader(cfg | {"workers": processes if processes > 1 else 0}, batch_size=_BATCH, seed=0)
  try:
    return _rate(lambda: len(next(loader)["pixels"]), seconds)
  finally:
    loader.close()


def _features_rate(folder: Path, seconds: float) -> float:
  """Rows of `task: features` in this process, from 512 records of random numbers."""
  folder = folder / "features"
  manifest = Manifest({}, (64, 1792), "bfloat16", "random", samples=512, shard_size=256)
  if not folder.exists():
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, samples in manifest.shards:
      arrays = (rng.standard_normal(manifest.shape, np.float32).astype(manifest.dtype) for _ in samples)
      write_shard(
        folder / name, [pack(array, f"a picture of {i} things") for i, array in zip(samples, arrays, strict=True)]
      )
    manifest.write(folder)
  tokenizer = load_tokenizer(find("micro") / "tokenizer")
  cfg = {"task": "features", "path": str(folder), "max_length": 448}
  loader = pipeline.make_loader(cfg, batch_size=_BATCH, seed=0, tokenizer=tokenizer)
  try:
    return _rate(lambda: len(next(loader)["features"]), seconds)
  finally:
    loader.close()


def _rate(take: Callable[[], int], seconds: float) -> float:
  """Samples a second; `take` fetches some and says how many."""
  warm = 0
  while warm < _WARM:  # what was read ahead while it started does not count
    warm += take()
  begin, count = time.perf_counter(), 0
  while time.perf_counter() - begin < seconds:
    count += take()
  return count / (time.perf_counter() - begin)
