"""Measurements, one file a bench; each prints what it measured, where and how. Here: what they share."""

import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from blip3o_jax import __version__
from blip3o_jax.data.outputs import write_atomically


def in_turn(rounds: int, *calls: Callable[[], Any]) -> list[list[float]]:
  """Seconds of each call, in the order A B C A B C ..., so that a machine that slows down slows all.

  Each call must return arrays of all that it computes; it has ended when they are there. Warm up and compile before.
  """
  seconds: list[list[float]] = [[] for _ in calls]
  for _ in range(rounds):
    for call, kept in zip(calls, seconds, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(call())
      kept.append(time.perf_counter() - start)
  return seconds


def spread(seconds: list[float]) -> dict[str, float]:
  """Median, least and most."""
  return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """What a program needs on one device at most, by its compiler: arguments, results and all in between."""
  m = compiled.memory_analysis()
  return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def report(path: Path | None, figures: dict[str, Any]) -> dict[str, Any]:
  """The figures with device, versions and date; written to `path` if one is given."""
  facts = {
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
    "blip3o_jax": __version__,
    "date": datetime.date.today().isoformat(),
  }
  if path:
    write_atomically(path, (json.dumps(facts | figures, indent=2) + "\n").encode())
  return facts | figures
