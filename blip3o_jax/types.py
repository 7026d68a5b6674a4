"""Shape letters and shared types (floor 0).

The letters below are used in docstrings, einsum strings and local names alike.

  B batch            L text tokens         Q learnable queries     N image tokens (grid h * w)
  D model width      H query heads         G key-value heads       K head size
  F feed-forward     E condition width     C channels (features)   T timesteps
  P vision patches   I images in a row     V vocabulary            S source/key length
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Mapping[str, Any]  # nested dict of arrays
Batch = dict[str, Array]
