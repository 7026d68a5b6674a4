"""The split into trained and frozen."""

import jax.numpy as jnp
import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.training import state

PARAMS = {
  "dit": {"layers": {"kernel": jnp.ones((2, 3))}, "out": {"bias": jnp.zeros(4)}},
  "queries": {"latent_queries": jnp.ones((5,))},
  "backbone": {"text": {"kernel": jnp.ones((7,))}},
}


def test_split_and_merge():
  trained, frozen = state.split(PARAMS, ("dit/.*kernel", "queries/"))
  assert (state.count(trained), state.count(frozen)) == (11, 11)
  assert set(trained) == {"dit", "queries"} and set(trained["dit"]) == {"layers"}
  assert set(frozen) == {"dit", "backbone"} and set(frozen["dit"]) == {"out"}
  merged = state.merge(trained, frozen)
  assert merged["dit"].keys() == PARAMS["dit"].keys() and merged["backbone"] is not PARAMS["backbone"]
  assert state.count(merged) == 22
  assert "11 trained" in state.overview(trained, frozen).splitlines()[-1]


@pytest.mark.parametrize(
  "patterns, words", [(("unet/",), "unet/"), ((), "empty"), (("dit/(",), "regular"), (("kernel",), "kernel")]
)
def test_bad_patterns(patterns, words):
  with pytest.raises(UserError, match=words):
    state.split(PARAMS, patterns)
