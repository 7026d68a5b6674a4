"""`blip3o data inspect`: what the model will see of a config's data, before anything is paid for.

Takes the first samples of the very order in which training will, builds them as training does, and tells shares of the
sources, prompts, token counts, bad samples and speed; the pictures are those that reach the model, not the files.
"""

import collections
import concurrent.futures
import dataclasses
import json
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from blip3o_jax.data import pipeline
from blip3o_jax.data.outputs import encode_png, writable_folder, write_atomically
from blip3o_jax.data.pictures import Pictures
from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.training.feed import preparation

_CELL = 240  # side of a picture on the sheet, pixels
_COLUMNS = 6  # pictures a row
_PICTURES = 4 * _COLUMNS  # on the sheet of a group
_LINES = 6  # of text under each
_BARS = 40  # characters of the longest bar of a histogram
_SHOWN = 10  # bad samples that are printed; all are in the report


@dataclasses.dataclass(frozen=True)
class Seen:
  """One sample as the model gets it; what does not apply to its task, or to a bad one, is None.

  prompt: its tokens as text. tokens: how many they would be uncut; cut: how many of these do not fit. error: why it is
  bad, and will be replaced. picture: uint8 [H, W, 3].
  """

  name: str
  source: str
  text: str | None = None
  prompt: str | None = None
  tokens: int | None = None
  cut: int | None = None
  error: str | None = None
  picture: np.ndarray | None = dataclasses.field(default=None, repr=False)


def run(config: ConfigDict, out: str | Path, *, num: int = 256, seconds: float = 5.0) -> Iterator[str]:
  """Lines to print; leaves contact.png, samples.jsonl and report.json in `out`.

  Args:
    config: an experiment, see training.config.load_config.
    num: samples to look at, over all groups.
    seconds: for how long to measure the loader.

  Raises:
    UserError: what is wrong with the config or its data as a whole.
  """
  out, cfg = writable_folder(out), config.data.to_dict()
  configs, reading = pipeline.parse(cfg)
  architecture = presets.get(config.model.preset, config.model.to_dict()["overrides"])
  tools = preparation(config, architecture)
  report, rows, sheets = {}, [], []
  for group in pipeline.open_groups(configs, config.batch_size, config.seed, **tools):
    count = max(num * group.batch // config.batch_size, 1)
    with concurrent.futures.ThreadPoolExecutor(reading.threads) as pool:
      look = lambda i, g=group: _look(g, int(g.order[i]), tools, keep=i < _PICTURES)
      samples = list(pool.map(look, range(count)))
    report[group.name or "data"] = facts = _facts(group, samples)
    yield from _told(group, facts, samples)
    rows += [{"group": group.name, **_row(sample)} for sample in samples]
    sheets.append(_sheet(samples))
  report["rows_per_second"] = rate = _rate(cfg, config, tools, seconds)
  yield f"loader: {rate:.0f} rows a second ({_words(reading)}; the first batch not counted)"
  write_atomically(out / "contact.png", encode_png(np.concatenate(sheets)))
  write_atomically(out / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
  write_atomically(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
  yield from (str(out / name) for name in ("contact.png", "samples.jsonl", "report.json"))


# ---- looking


def _look(group: pipeline.Group, index: int, tools: dict[str, Any], keep: bool) -> Seen:
  """`keep` its picture: those of all samples looked at would fill the memory."""
  source = group.mixture.source_of(index)
  try:
    record = group.mixture.record(index)
    sample = group.build(record)
  except UserError as error:
    return Seen(name=f"sample {index}", source=source, error=str(error))
  text, picture = record.get("text"), _picture(sample, tools["pictures"]) if keep else None
  seen = Seen(record["name"], source, text if isinstance(text, str) else None, picture=picture)
  if "tokens" not in sample:
    return seen
  tokens = sample["tokens"][sample["token_mask"]]
  prompt = tools["tokenizer"].decode(tokens, skip_special=False)
  prompt = re.sub(r"(<\|image_pad\|>|<image>)+", lambda pads: f"{pads[1]} x {len(pads[0]) // len(pads[1])}", prompt)
  cut = int(sample["cut"])
  return dataclasses.replace(seen, prompt=prompt, tokens=len(tokens) + cut, cut=cut)


def _picture(sample: dict[str, np.ndarray], pictures: Pictures | None) -> np.ndarray | None:
  if "pixels" in sample:
    return sample["pixels"]
  return pictures.shown(sample) if pictures and "labels" in sample else None


def _facts(group: pipeline.Group, samples: list[Seen]) -> dict[str, Any]:
  drawn = collections.Counter(sample.source for sample in samples)
  facts = {
    "rows_of_a_batch": group.batch,
    "sources": {
      name: {"samples": size, "share": group.mixture.shares[name], "drawn": drawn[name]}
      for name, size in group.mixture.sizes().items()
    },
    "looked_at": len(samples),
    "bad": [sample.error for sample in samples if sample.error],
  }
  tokens = np.array([sample.tokens for sample in samples if sample.tokens is not None])
  if len(tokens):
    quantiles = {f"p{q}": int(np.percentile(tokens, q)) for q in (0, 5, 50, 95, 100)}
    cut = float(np.mean([sample.cut > 0 for sample in samples if sample.cut is not None]))
    facts["tokens"] = {"mean": float(tokens.mean()), **quantiles, "truncated": cut}
  return facts


def _rate(cfg: dict, config: ConfigDict, tools: dict[str, Any], seconds: float) -> float:
  loader = pipeline.make_loader(cfg, batch_size=config.batch_size, seed=config.seed, **tools)
  try:
    next(loader)  # starts threads and processes
    start, batches = time.perf_counter(), 0
    while not batches or time.perf_counter() - start < seconds:
      next(loader)
      batches += 1
    return batches * config.batch_size / (time.perf_counter() - start)
  finally:
    loader.close()


# ---- telling


def _told(group: pipeline.Group, facts: dict[str, Any], samples: list[Seen]) -> Iterator[str]:
  head = f"{group.name}: " if group.name else ""
  yield f"{head}task {group.build.cfg.task}, {group.batch} rows of every batch"
  for name, source in facts["sources"].items():
    drawn = source["drawn"] / facts["looked_at"]
    yield f"  {name}: {source['samples']} samples, share {source['share']:.2%}; {drawn:.2%} of those looked at"
  if first := next((sample for sample in samples if sample.prompt), None):
    yield f"  what the model reads, of {first.name}:"
    yield from (f"    {line}" for line in first.prompt.splitlines())
  if tokens := facts.get("tokens"):
    limit = group.build.cfg.max_length
    yield (
      f"  tokens a row: mean {tokens['mean']:.1f}, median {tokens['p50']}, 95th percentile {tokens['p95']}, longest "
      f"{tokens['p100']}; {tokens['truncated']:.2%} are cut to max_length {limit}"
    )
    yield from _histogram(np.array([sample.tokens for sample in samples if sample.tokens is not None]))
  bad = facts["bad"]
  yield f"  bad: {len(bad)} of {facts['looked_at']} samples{', each replaced by another of its source' * bool(bad)}"
  yield from (f"    {why}" for why in bad[:_SHOWN])
  if len(bad) > _SHOWN:
    yield f"    ... and {len(bad) - _SHOWN} more"


def _histogram(values: np.ndarray) -> Iterator[str]:
  width = int(np.ptp(values)) // 10 + 1
  counts = np.bincount((values - values.min()) // width)
  for i, count in enumerate(counts):
    low = values.min() + i * width
    yield f"    {low:6d} to {low + width - 1:5d} {count:6d} {'#' * -(-_BARS * count // counts.max())}".rstrip()


def _words(reading: pipeline.Reading) -> str:
  return ", ".join(f"{name} {value}" for name, value in vars(reading).items())


def _row(sample: Seen) -> dict[str, Any]:
  return {name: value for name, value in vars(sample).items() if name != "picture" and value is not None}


def _sheet(samples: list[Seen]) -> np.ndarray:
  """A contact sheet, uint8 [H, W, 3]: pictures in the order in which they come, with what belongs to them."""
  shown = samples[:_PICTURES]
  font, line = ImageFont.load_default(12), 16
  width, height = _CELL + 12, _CELL + 12 + _LINES * line
  sheet = Image.new("RGB", (_COLUMNS * width, -(-len(shown) // _COLUMNS) * height), "white")
  draw = ImageDraw.Draw(sheet)
  for i, sample in enumerate(shown):
    left, top = i % _COLUMNS * width + 6, i // _COLUMNS * height + 6
    if sample.picture is not None:
      picture = Image.fromarray(sample.picture)
      scale = _CELL / max(picture.size)
      sheet.paste(picture.resize([max(1, round(side * scale)) for side in picture.size]), (left, top))
    else:
      draw.rectangle((left, top, left + _CELL, top + _CELL), fill="lightgray")
    count = "" if sample.tokens is None else f"{sample.tokens} tokens{f' ({sample.cut} cut)' if sample.cut else ''}"
    words = sample.error or sample.text or sample.prompt or ""
    under = [count, *textwrap.wrap(" ".join(words.split()), 40)][:_LINES]
    draw.text((left, top + _CELL + 2), "\n".join(under), fill="red" if sample.error else "black", font=font, spacing=3)
  return np.asarray(sheet)
