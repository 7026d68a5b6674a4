import collections

import pytest

from blip3o_jax.data.mixture import Mixture
from blip3o_jax.errors import UserError

SIZES = {"long": 270, "short": 50, "journeydb": 40}
SOURCES = {name: [{"name": f"{name} {i}"} for i in range(n)] for name, n in SIZES.items()}


def mixture(**weights):
  return Mixture(SOURCES, {name: 0.0 for name in SIZES} | weights)


def drawn(m, seed, start, end):
  order = m.order(seed)
  return [m.record(int(order[i]))["name"] for i in range(start, end)]


def counts(names):
  return collections.Counter(name.split()[0] for name in names)


def test_without_weights_sources_are_as_good_as_concatenated():
  epoch = drawn(mixture(), 1, 0, 360)
  assert sorted(epoch) == sorted(row["name"] for rows in SOURCES.values() for row in rows)
  assert drawn(mixture(), 1, 360, 720) != epoch != drawn(mixture(), 2, 0, 360)


def test_any_stretch_holds_the_shares():
  m = mixture(long=0.5, short=0.3, journeydb=0.2)
  assert m.shares == {"long": 0.5, "short": 0.3, "journeydb": 0.2}
  names = drawn(m, 0, 0, 2000)
  for start in (0, 7, 990):
    for length in (10, 64, 1000):
      found = counts(names[start : start + length])
      assert all(abs(found[name] - share * length) <= 2 for name, share in m.shares.items()), (start, length, found)


def test_each_source_goes_through_all_its_samples_again_and_again():
  names = [name for name in drawn(mixture(long=1, short=1, journeydb=2), 0, 0, 640) if name.startswith("journeydb")]
  epochs = [names[i : i + 40] for i in range(0, 320, 40)]
  assert all(len(set(epoch)) == 40 for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 8


def test_sources_of_one_size_are_not_shuffled_alike():
  m = Mixture({name: [{"name": f"{name} {i}"} for i in range(50)] for name in "ab"}, {"a": 0.0, "b": 0.0})
  names = drawn(m, 0, 0, 100)
  assert [n[2:] for n in names if n[0] == "a"] != [n[2:] for n in names if n[0] == "b"]


def test_far_samples_cost_nothing():
  m = mixture(short=1000)
  assert drawn(m, 3, 10**15, 10**15 + 5) == drawn(m, 3, 10**15, 10**15 + 5)


def test_a_shifted_record_stays_in_its_source():
  m = mixture()
  assert m.record(319, 1)["name"] == "short 0" and m.record(320, -1)["name"] == "journeydb 39"
  assert m.source_of(319) == "short" and m.source_of(320) == "journeydb"


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "2", None])
def test_what_is_no_weight(weight):
  with pytest.raises(UserError, match=f"short has weight {weight!r}; a weight is a number from 0"):
    mixture(short=weight)
