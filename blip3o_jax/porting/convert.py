"""Weights in the reference's key names <-> our parameter trees, by tables of rules (floor 3).

One table serves both directions. Nothing is guessed: a key that no rule knows, a parameter that no key fills and a
shape that does not fit are all collected and told at once.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from blip3o_jax.errors import UserError
from blip3o_jax.types import Params

_HOLE = re.compile(r"\{(\w+|\*)\}")
_SHOWN = 40  # problems printed in one error


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of a weight table.

  Attributes:
    source: reference key with integer placeholders, "layers.{i}.attn1.to_q.weight"; `{*}` matches any text.
    target: path of our parameter, "layers/attn1/q/kernel". A placeholder that occurs in the target is written into the
      path ("down_{i}_resnet_{j}/conv1/kernel"); the others become leading stacked axes, in the order of the source.
      A tuple of paths: the key holds that many equal pieces along its first axis (a fused qkv). None: the key is
      knowingly left out.
    transform: name in TRANSFORMS, "linear", "conv", ... (an argument follows a colon: "patch_conv:4").
    aliases: other spellings of `source` that are read but never written. A tuple of keys is concatenated along the
      first axis, with None for zeros as large as its first member (EVA-CLIP's q_bias and v_bias without k_bias).
    optional: the key is passed over where the model has no such parameter (the head of a model with tied embeddings).
  """

  source: str
  target: str | tuple[str, ...] | None
  transform: str = "none"
  aliases: tuple[str | tuple[str | None, ...], ...] = ()
  optional: bool = False

  @property
  def targets(self) -> tuple[str, ...]:
    return (self.target,) if isinstance(self.target, str) else self.target or ()

  @property
  def stacked(self) -> tuple[str, ...]:
    """Placeholders that become leading axes."""
    named = set(_HOLE.findall("".join(self.targets)))
    return tuple(hole for hole in _HOLE.findall(self.source) if hole not in named)


def _square_patch(rows: int, per_pixel: int) -> int:
  side = round((rows / per_pixel) ** 0.5)
  if side * side * per_pixel != rows:
    raise ValueError(f"{rows} rows are not a square patch of {per_pixel} numbers a pixel")
  return side


def _patch_conv_inverse(x: np.ndarray, channels: int = 3) -> np.ndarray:
  side = _square_patch(x.shape[0], channels)
  return x.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)


def _patch_conv3d_inverse(x: np.ndarray, channels: int = 3, frames: int = 2) -> np.ndarray:
  side = _square_patch(x.shape[0], channels * frames)
  return x.T.reshape(-1, channels, frames, side, side)


def _channels_first_inverse(x: np.ndarray, channels: int = 3) -> np.ndarray:
  side = _square_patch(x.shape[0], channels)
  return x.T.reshape(-1, channels, side, side)


# name -> (reference array -> ours, ours -> reference), both on one layer's array.
TRANSFORMS: dict[str, tuple[Callable, Callable]] = {
  "none": (lambda x: x, lambda x: x),
  # [out, in] <-> [in, out]
  "linear": (lambda x: x.T, lambda x: x.T),
  # [out, in, kh, kw] <-> [kh, kw, in, out]
  "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
  # [out, in, 1, 1] <-> [in, out]
  "conv1x1_linear": (lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[:, :, None, None]),
  # [out, in, k, k] <-> [k * k * in, out]: patches flattened (row, column, channel), as a reshape of NHWC gives them
  "patch_conv": (lambda x, c=3: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _patch_conv_inverse),
  # [out, in, k, k] <-> [in * k * k, out]: patches flattened (channel, row, column)
  "patch_conv_channels_first": (lambda x, c=3: x.reshape(x.shape[0], -1).T, _channels_first_inverse),
  # [out, in, t, k, k] <-> [in * t * k * k, out]: Qwen2.5-VL's patches (channel, frame, row, column)
  "patch_conv3d": (lambda x, c=3, t=2: x.reshape(x.shape[0], -1).T, _patch_conv3d_inverse),
  # [1, ...] <-> [...] and [1, 1, ...] <-> [...]
  "squeeze": (lambda x: x.reshape(x.shape[1:]), lambda x: x[None]),
  "squeeze2": (lambda x: x.reshape(x.shape[2:]), lambda x: x[None, None]),
}


def _transform(name: str, direction: int) -> Callable:
  name, *arguments = name.split(":")
  function = TRANSFORMS[name][direction]
  return functools.partial(lambda *more, x: function(x, *more), *map(int, arguments))


def to_ours_array(transform: str, x: np.ndarray) -> np.ndarray:
  """One reference array in our layout (a view where numpy can give one)."""
  return _transform(transform, 0)(x=x)


def to_reference_array(transform: str, x: np.ndarray) -> np.ndarray:
  """One of our arrays (one layer of it) in the reference's layout."""
  return _transform(transform, 1)(x=x)


# ---- names ----


@functools.cache
def _pattern(template: str) -> re.Pattern:
  parts = _HOLE.split(template)  # text, hole, text, hole, ...
  out = [re.escape(parts[0])]
  for hole, text in zip(parts[1::2], parts[2::2], strict=True):
    out += [".*" if hole == "*" else rf"(?P<{hole}>0|[1-9]\d*)", re.escape(text)]
  return re.compile("".join(out))


def _match(template: str, name: str) -> dict[str, int] | None:
  found = _pattern(template).fullmatch(name)
  return found and {hole: int(text) for hole, text in found.groupdict().items()}


def _fill(template: str, numbers: Mapping[str, int]) -> str:
  return _HOLE.sub(lambda hole: str(numbers[hole[1]]), template)


def _shape(reader: Mapping, key: str) -> tuple[int, ...]:
  return tuple(reader.shape(key) if hasattr(reader, "shape") else reader[key].shape)


def flatten(params: Params) -> dict[str, Any]:
  """Nested dict -> {"a/b/c": leaf}, in the order of the tree."""
  flat = {}
  for name, value in params.items():
    if isinstance(value, Mapping):
      flat.update({f"{name}/{path}": leaf for path, leaf in flatten(value).items()})
    else:
      flat[name] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    node = tree
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = leaf
  return tree


# ---- reference -> ours ----


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Where one slice of a leaf comes from: keys (None = zeros) to concatenate, then piece `part` of `parts`."""

  keys: tuple[str | None, ...]
  rule: Rule
  part: int

  @property
  def names(self) -> str:
    return " + ".join(key for key in self.keys if key is not None)

  def read(self, reader: Mapping) -> np.ndarray:
    arrays = [None if key is None else np.asarray(reader[key]) for key in self.keys]
    arrays = [np.zeros_like(arrays[0]) if a is None else a for a in arrays]
    x = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    parts = len(self.rule.targets)
    size = x.shape[0] // parts if parts > 1 else None
    return to_ours_array(self.rule.transform, x if parts == 1 else x[self.part * size : (self.part + 1) * size])

  def shape(self, reader: Mapping) -> tuple[int, ...]:
    shapes = [_shape(reader, self.keys[0] if key is None else key) for key in self.keys]
    return (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]


def _reference_shape(rule: Rule, layer_shape: Sequence[int]) -> tuple[int, ...]:
  """Shape that the reference's array must have to become `layer_shape` (no memory is touched: a zero-stride view)."""
  shape = to_reference_array(rule.transform, np.broadcast_to(np.zeros((), np.int8), layer_shape)).shape
  return (shape[0] * len(rule.targets), *shape[1:]) if len(rule.targets) > 1 else shape


def to_ours(
  rules: Sequence[Rule],
  reader: Mapping[str, Any],
  abstract: Params,
  *,
  place: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
  """Fill our parameter tree from reference weights, leaf by leaf: peak host memory is the result plus one leaf.

  Args:
    rules: the component's table.
    reader: {reference key: array}, a dict or a `safetensors_io.Reader` (whose `.shape(key)` reads no data).
    abstract: nested dict of `jax.ShapeDtypeStruct` (or arrays); values are cast to its dtypes.
    place: called with (path, array) as each leaf is complete; its result is stored instead, e.g. a `jax.device_put`
      that lets the host copy go.

  Returns:
    The filled tree.

  Raises:
    UserError: unknown or ambiguous keys, unfilled parameters, misfitting shapes: all of them in one message.
  """
  leaves, problems = flatten(abstract), []
  pieces: dict[str, dict[tuple[int, ...], _Piece]] = {path: {} for path in leaves}
  for key in reader:
    matches = list(_matches(rules, key))
    if len(matches) != 1:
      known = f"{len(matches)} rules match: {', '.join(rule.source for rule, *_ in matches)}"
      problems.append(f"{key}: expected no such key" if not matches else f"{key}: expected one rule, {known}")
      continue
    rule, spelling, numbers = matches[0]
    if rule.target is None:
      continue
    keys = spelling if isinstance(spelling, tuple) else (spelling,)
    keys = tuple(k and _fill(k, numbers) for k in keys)
    if absent := [k for k in keys if k is not None and k not in reader]:
      problems.append(f"{key}: expected beside it {', '.join(absent)}, found nothing")
      continue
    for part, target in enumerate(rule.targets):
      path = _fill(target, numbers)
      if path not in leaves:
        if not rule.optional:
          problems.append(f"{key}: expected no such key (this model has no parameter {path})")
        continue
      index = tuple(numbers[hole] for hole in rule.stacked)
      piece = _Piece(keys, rule, part)
      if pieces[path].setdefault(index, piece) != piece:
        problems.append(f"{key}: expected once, but {pieces[path][index].names} is there as well")

  for path, leaf in leaves.items():
    problems += _check(path, leaf, pieces[path], rules, reader)
  if problems:
    _raise(problems, "weights that do not fit the model")

  done = {}
  for path, leaf in leaves.items():
    array = np.empty(leaf.shape, leaf.dtype)
    for index, piece in pieces[path].items():
      array[index] = piece.read(reader)
    done[path] = array if place is None else place(path, array)
  return unflatten(done)


def _matches(rules: Sequence[Rule], key: str) -> Iterator[tuple[Rule, str | tuple, dict[str, int]]]:
  for rule in rules:
    for spelling in (rule.source, *rule.aliases):
      names = [s for s in (spelling if isinstance(spelling, tuple) else (spelling,)) if s is not None]
      numbers = next((n for n in (_match(s, key) for s in names) if n is not None), None)
      if numbers is not None:
        yield rule, spelling, numbers
        break


def _check(path: str, leaf: Any, pieces: dict, rules: Sequence[Rule], reader: Mapping) -> Iterator[str]:
  """Problems of one leaf: absent keys, layers beyond its depth, wrong shapes."""
  writers = _writers(rules, path)
  if len(writers) != 1:
    yield f"parameter {path}: expected one rule that fills it, found {len(writers)}"
    return
  rule, numbers = writers[0]
  depth = len(rule.stacked)
  if depth > len(leaf.shape):
    yield f"parameter {path}: expected {depth} stacked axes ({rule.source}), found shape {tuple(leaf.shape)}"
    return
  wanted = set(itertools.product(*(range(n) for n in leaf.shape[:depth])))
  named = lambda index: _fill(rule.source, numbers | dict(zip(rule.stacked, index, strict=True)))
  try:
    shape = _reference_shape(rule, leaf.shape[depth:])
  except ValueError as error:
    yield f"parameter {path}: expected a shape that fits {rule.source}, found {tuple(leaf.shape)} ({error})"
    return
  for index in sorted(wanted - set(pieces)):
    yield f"{named(index)}: expected {list(shape)}, found nothing"
  for index in sorted(set(pieces) - wanted):
    yield f"{named(index)}: expected at most {list(leaf.shape[:depth])} layers, found this key"
  for index in sorted(set(pieces) & wanted):
    found = pieces[index].shape(reader)
    if found != shape:
      yield f"{pieces[index].names}: expected {list(shape)}, found {list(found)}"


def _raise(problems: Sequence[str], head: str) -> None:
  problems = list(dict.fromkeys(problems))
  more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
  raise UserError("\n  ".join([f"{len(problems)} {head}:", *problems[:_SHOWN], *more]))


# ---- ours -> reference ----


@dataclasses.dataclass(frozen=True)
class _Output:
  """One reference key: piece `index` of the leaves at `paths`, concatenated where there are several."""

  key: str
  rule: Rule
  paths: tuple[str, ...]
  index: tuple[int, ...]


def _outputs(rules: Sequence[Rule], leaves: Mapping[str, Any]) -> list[_Output]:
  outputs, problems = [], []
  for path, leaf in leaves.items():
    writers = _writers(rules, path)
    if len(writers) != 1:
      problems.append(f"parameter {path}: expected one rule that writes it, found {len(writers)}")
      continue
    rule, numbers = writers[0]
    paths = tuple(_fill(target, numbers) for target in rule.targets)
    if absent := [p for p in paths if p not in leaves]:
      problems.append(f"parameter {path}: expected beside it {', '.join(absent)}, found nothing")
    if path != paths[0]:
      continue  # written with the first piece
    for index in itertools.product(*(range(n) for n in leaf.shape[: len(rule.stacked)])):
      key = _fill(rule.source, numbers | dict(zip(rule.stacked, index, strict=True)))
      outputs.append(_Output(key, rule, paths, index))
  if problems:
    _raise(problems, "parameters that cannot be written")
  return outputs


def _writers(rules: Sequence[Rule], path: str) -> list[tuple[Rule, dict[str, int]]]:
  return [(r, n) for r in rules for t in r.targets if (n := _match(t, path)) is not None]


def reference_specs(rules: Sequence[Rule], abstract: Params, dtype: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
  """{reference key: shape and dtype} of a parameter tree, in the order of `to_reference`; no data is touched.

  Raises:
    UserError: as `to_reference`.
  """
  leaves, specs = flatten(abstract), {}
  for out in _outputs(rules, leaves):
    leaf = leaves[out.paths[0]]
    shape = _reference_shape(out.rule, leaf.shape[len(out.index) :])
    specs[out.key] = jax.ShapeDtypeStruct(shape, _stored(leaf.dtype, dtype))
  return specs


def to_reference(rules: Sequence[Rule], params: Params, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
  """Our parameters in the reference's key names and layouts, one at a time: (key, contiguous array).

  One key's array is on the host at a time. Arrays sharded over several processes are gathered, so then every process
  must run through the iterator.

  Args:
    dtype: what floating-point parameters are cast to; each keeps its own if None.

  Raises:
    UserError: parameters that no rule, or more than one, writes; raised before anything is given out.
  """
  leaves = flatten(params)
  return _stream(leaves, _outputs(rules, leaves), dtype)


def content_hash(rules: Sequence[Rule], params: Params, dtype: Any = None) -> str:
  """The identity of a component's weights, whatever file or layout they lie in.

  sha256 over the reference's keys in sorted order: name, dtype name and comma-separated shape of each, closed by a zero
  byte, then its C-order little-endian bytes.
  """
  leaves = flatten(params)
  outputs = sorted(_outputs(rules, leaves), key=lambda out: out.key)
  digest = hashlib.sha256()
  for key, array in _stream(leaves, outputs, dtype):
    digest.update(f"{key}\0{array.dtype.name}\0{','.join(map(str, array.shape))}\0".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _stored(dtype: Any, wanted: Any) -> np.dtype:
  return np.dtype(wanted) if wanted is not None and jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)


def _stream(leaves: Mapping[str, Any], outputs: Sequence[_Output], dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
  for out in outputs:
    parts = [to_reference_array(out.rule.transform, _on_host(leaves[path][out.index])) for path in out.paths]
    array = parts[0] if len(parts) == 1 else np.concatenate(parts)
    yield out.key, np.ascontiguousarray(array, _stored(array.dtype, dtype)).reshape(array.shape)


def _on_host(x: Any) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)
