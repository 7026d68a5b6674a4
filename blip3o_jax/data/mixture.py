"""Several sources as one endless sequence of samples, in proportion to their weights.

Sample i is a pure function of (weights, seed, i) and found without going through those before it. Sources take turns as
evenly as their weights allow, so that any stretch of the sequence, and so every batch, holds each source's share to
within a sample or so; every source goes through its own samples once an epoch, in a new order each time.
"""

import bisect
import math
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from blip3o_jax.data.sources import Source
from blip3o_jax.errors import UserError


def _is_weight(value: Any) -> bool:
  return isinstance(value, int | float) and 0 <= value < math.inf


class Mixture:
  """Sources under names, and samples numbered from 0 over all of them, one source after the other.

  Args:
    sources: by name.
    weights: of each; 0 = its number of samples. All zero: as if the sources were concatenated and shuffled.

  Raises:
    UserError: a weight that is none.
  """

  def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float]):
    self.names, self._sources = list(sources), list(sources.values())
    if bad := [name for name in self.names if not _is_weight(weights[name])]:
      raise UserError(f"data source {bad[0]} has weight {weights[bad[0]]!r}; a weight is a number from 0 (its size) on")
    self._starts = np.cumsum([0] + [len(source) for source in self._sources]).tolist()
    total = [weights[name] or len(sources[name]) for name in self.names]
    self.shares = {name: weight / sum(total) for name, weight in zip(self.names, total, strict=True)}

  def __len__(self) -> int:
    return self._starts[-1]

  def __repr__(self) -> str:
    if len(self.names) == 1:
      return repr(self._sources[0])
    return ", ".join(
      f"{name} {self.shares[name]:.4g}: {source!r}" for name, source in zip(self.names, self._sources, strict=True)
    )

  def sizes(self) -> dict[str, int]:
    """Number of samples of each source."""
    return {name: len(source) for name, source in zip(self.names, self._sources, strict=True)}

  def order(self, seed: int) -> grain.MapDataset:
    """The endless sequence of sample numbers. Proportions are kept to within one percent of the smallest weight."""
    parts = [
      grain.MapDataset.range(start, end).seed(seed + number).shuffle().repeat()
      for number, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False))
    ]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, list(self.shares.values()))

  def source_of(self, sample: int) -> str:
    """Name of the source of a sample."""
    return self.names[bisect.bisect_right(self._starts, sample) - 1]

  def record(self, sample: int, shift: int = 0) -> dict:
    """The record of a sample, or of the one `shift` places after it in its source (from the end to the beginning).

    Raises:
      UserError: the sample is bad.
    """
    number = bisect.bisect_right(self._starts, sample) - 1
    source = self._sources[number]
    return source[(sample - self._starts[number] + shift) % len(source)]
