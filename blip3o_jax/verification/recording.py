"""A recording: inputs and results of the reference on disk, and the account of which of them ours meets.

Every recorded array is an input, compared, or set aside with a reason; one that is none of these is a miss.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import UserError, told
from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.porting import convert, rules, safetensors_io

FORWARD = 1e-4  # float32 bars (DESIGN part 3)
TRAJECTORY = 1e-3  # also for gradients

# What arrays, weights and settings raise that do not fit each other.
MISFITS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, flax.errors.FlaxError)


@dataclasses.dataclass(frozen=True)
class Line:
  """What became of one array. status: "ok", "miss", "input", "not compared" or "not recorded"."""

  name: str
  status: str
  error: float | None = None
  bar: float | None = None
  note: str = ""

  def __str__(self) -> str:
    numbers = "" if self.error is None else f"error {self.error:8.1e}  bar {self.bar:7.0e}"
    return f"  {self.name:55s} {self.status:13s} {numbers} {self.note}".rstrip()


class Recording:
  """One directory: fixture.json (component and file names), config, weights and arrays.

  Raises:
    UserError: a file is absent or cannot be read.
  """

  def __init__(self, directory: os.PathLike | str):
    self.path = Path(directory)
    self.fixture = {"config": "config.json"} | self._json("fixture.json")
    for key in ("component", "config", "io"):
      if not isinstance(self.fixture.get(key), str):
        raise UserError(f"{self.path / 'fixture.json'}: no {key!r}; is this a recording?")
    self.component: str = self.fixture["component"]
    self.config = self._json(self.fixture["config"])
    self.lines: list[Line] = []
    self._known: dict[str, None] = {}
    path = self.path / self.fixture["io"]
    try:
      with np.load(path, allow_pickle=False) as stored:
        self._arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
      raise UserError(f"{path}: no such file; the recording is incomplete") from error
    except Exception as error:  # a damaged zip raises a dozen different things
      raise UserError(f"{path}: cannot be read ({error}); copy the recording again") from error

  def _json(self, name: str) -> dict[str, Any]:
    path = self.path / name
    try:
      content = json.loads(path.read_text())
    except OSError as error:
      raise UserError(f"{path}: {error.strerror or error}; give a directory with a recording") from error
    except ValueError as error:
      raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
      raise UserError(f"{path}: expected a JSON object")
    return content

  def weights(self) -> safetensors_io.Reader:
    """The weights, in the reference's key names: the named file or its shards; where none is named, the directory's."""
    if "weights" not in self.fixture:
      return safetensors_io.open_weights(self.path)
    path = self.path / self.fixture["weights"]
    index = path.with_name(f"{path.name}.index.json")
    return safetensors_io.open_weights(index if index.exists() and not path.exists() else path)

  def setting(self, *names: str) -> Any:
    """An entry of the config. Raises UserError if it is absent."""
    value: Any = self.config
    for name in names:
      if not isinstance(value, Mapping) or name not in value:
        raise UserError(f"{self.fixture['config']} has no {'.'.join(names)}")
      value = value[name]
    return value

  def build(self, from_reference: Callable, *args) -> Any:
    """Our config by its `from_reference`. Raises UserError if the recording's lacks something or is no such config."""
    try:
      return from_reference(*args)
    except MISFITS as error:
      raise UserError(f"{self.fixture['config']} cannot be understood ({told(error)})") from error

  # ---- the account

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(self._arrays)

  def __contains__(self, name: str) -> bool:
    return name in self._arrays

  def ndim(self, name: str) -> int:
    """Number of axes of a recorded array."""
    return self._arrays[name].ndim

  def length(self, name: str, axis: int) -> int:
    """Size of one axis of a recorded array."""
    return self._arrays[name].shape[axis]

  def matching(self, pattern: str) -> Iterator[tuple[str, int]]:
    """Recorded names that fit `pattern` entirely, with the number in its group."""
    for name in self._arrays:
      if found := re.fullmatch(pattern, name):
        yield name, int(found[1])

  def input(self, name: str) -> np.ndarray:
    """An array that ours starts from. Raises UserError if it is absent or not finite."""
    if name not in self._arrays:
      raise UserError(f"the input {name!r} is not in {self.fixture['io']}; record it")
    array = self._arrays[name]
    if not np.isfinite(array).all():
      raise UserError(f"the input {name!r} holds numbers that are not finite")
    if name not in self._known:
      self._note(Line(name, "input"))
    return array.astype(np.float32) if array.dtype.kind == "f" else array

  def compare(self, name: str, ours: Any, bar: float = FORWARD, valid: np.ndarray | None = None) -> None:
    """Compare with the recorded array, if there is one.

    Floats: max|ours - recorded| / max(max|recorded|, 1e-6) must stay within `bar`. Integers are equal; uint8 within 1.

    Args:
      valid: bool, broadcastable to the array: where to look. Nothing valid counts as a miss.
    """
    if name not in self._arrays:
      self.lines.append(Line(name, "not recorded"))
      return
    theirs, ours = self._arrays[name], np.asarray(ours)
    whole = np.issubdtype(theirs.dtype, np.integer) or theirs.dtype == bool
    bar = (1.0 if theirs.dtype == np.uint8 else 0.0) if whole else bar
    if ours.shape != theirs.shape:
      self._note(Line(name, "miss", float("inf"), bar, f"shape {ours.shape}, recorded {theirs.shape}"))
      return
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if valid is not None:
      where = np.broadcast_to(valid, b.shape)
      a, b = a[where], b[where]
    if not b.size:
      self._note(Line(name, "miss", float("inf"), bar, "nothing to compare"))
      return
    error = float("inf")
    if np.isfinite(a).all() and np.isfinite(b).all():
      error = float(np.abs(a - b).max()) / (1.0 if whole else max(float(np.abs(b).max()), 1e-6))
    self._note(Line(name, "ok" if error <= bar else "miss", error, bar))

  def skip(self, name: str, reason: str) -> None:
    """Set an array aside."""
    if name in self._arrays:
      self._note(Line(name, "not compared", note=reason))

  def _note(self, line: Line) -> None:
    self._known[line.name] = None
    self.lines.append(line)

  def compare_gradients(
    self,
    grads: Mapping[str, Any],
    key: Callable[[str, str], str],
    prefix: str = "grad:",
    model: Blip3oConfig | None = None,
  ) -> None:
    """Compare every recorded `<prefix><weight name>` with ours.

    Args:
      grads: {component: gradient tree}.
      key: (component, key in its table) -> name in this recording's weights.
      model: the whole, where a backbone is among the components.
    """
    # Newer checkpoints have the language model one level deeper.
    wanted = {n.replace("language_model.", "", 1): n for n in self._arrays if n.startswith(prefix)}
    for component, tree in grads.items():
      for reference_key, array in convert.to_reference(rules.get(component, model), tree):
        name = prefix + key(component, reference_key)
        if name in wanted:
          self.compare(wanted[name], array, TRAJECTORY)

  def close(self) -> list[Line]:
    """The account, with a miss for every array that nothing asked for, and for a recording that compares nothing."""
    for name in self._arrays:
      if name not in self._known:
        self._note(Line(name, "miss", note="no rule knows this array"))
    if not any(line.error is not None for line in self.lines):
      self.lines.append(Line("(recording)", "miss", note="nothing was compared"))
    return self.lines


def load_params(
  component: str, reader: Mapping[str, Any], model: nn.Module, *args, method: Any = None
) -> dict[str, Any]:
  """float32 parameters of `model` from reference weights; `args` are inputs that its initialisation can take."""
  init = lambda: nn.unbox(model.init(jax.random.key(0), *args, method=method))["params"]
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), jax.eval_shape(init))
  return convert.to_ours(rules.get(component), reader, abstract, place=lambda _, array: jnp.asarray(array))


def shapes(reader: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """{key: shape}."""
  return {key: reader.shape(key) for key in reader}


def nhwc(x: np.ndarray) -> jax.Array:
  """[B, C, H, W] -> [B, H, W, C]."""
  return jnp.asarray(x).transpose(0, 2, 3, 1)


def nchw(x: Any) -> np.ndarray:
  """[B, H, W, C] -> [B, C, H, W]."""
  return np.asarray(x).transpose(0, 3, 1, 2)


def sown(state: Mapping[str, Any], *path: str) -> np.ndarray:
  """A sown intermediate (the first, where a module ran more than once)."""
  value = state["intermediates"]
  for name in path:
    value = value[name]
  return np.asarray(value[0])
