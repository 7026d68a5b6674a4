"""Weights in the reference's key names <-> our parameter trees, by tables of rules (floor 3).

One table serves both directions. Nothing is guessed: a key that no rule knows, a parameter that no key fills and a
shape that does not fit are all collected and told at once.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import UserError
from blip3o_jax.porting.layouts import to_ours_array, to_reference_array
from blip3o_jax.porting.safetensors_io import Spec, Stored, pieces, spec, stream, tell
from blip3o_jax.sharding.distributed import whole
from blip3o_jax.types import Params

_HOLE = re.compile(r"\{(\w+|\*)\}")


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of a weight table.

  Attributes:
    source: reference key with integer placeholders, "layers.{i}.attn1.to_q.weight"; `{*}` matches any text.
    target: path of our parameter, "layers/attn1/q/kernel". A placeholder that occurs in the target is written into the
      path ("down_{i}_resnet_{j}/conv1/kernel"); the others become leading stacked axes, in the order of the source.
      A tuple of paths: the key holds that many equal pieces along its first axis (a fused qkv). None: the key is
      knowingly left out.
    transform: name in layouts.TRANSFORMS, "linear", "conv", ... (an argument follows a colon: "patch_conv:4").
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


class Canonical(Mapping[str, np.ndarray]):
  """Reference weights under the names that a table writes: other spellings resolved, split arrays joined, what the
  table leaves out left out. Arrays are read when asked for.

  Attributes:
    problems: keys that no rule, or more than one, knows; keys that are there in two spellings, or in half of one.
    dropped: keys that the table knowingly leaves out.
  """

  def __init__(self, rules: Sequence[Rule], reader: Mapping[str, Any]):
    self._reader = reader
    self._keys: dict[str, tuple[str | None, ...]] = {}  # None: zeros as large as the first
    self._rules: dict[str, Rule] = {}
    self.problems: list[str] = []
    self.dropped: list[str] = []
    for key in reader:
      matches = list(_matches(rules, key))
      if len(matches) != 1:
        known = f"{len(matches)} rules match: {', '.join(rule.source for rule, *_ in matches)}"
        self.problems.append(f"{key}: expected {f'one rule, {known}' if matches else 'no such key'}")
        continue
      rule, spelling, numbers = matches[0]
      if rule.target is None:
        self.dropped.append(key)
        continue
      keys = tuple(k and _fill(k, numbers) for k in (spelling if isinstance(spelling, tuple) else (spelling,)))
      if absent := [k for k in keys if k is not None and k not in reader]:
        self.problems.append(f"{key}: expected beside it {', '.join(absent)}, found nothing")
        continue
      name = _fill(rule.source, numbers)
      if self._keys.setdefault(name, keys) != keys:
        self.problems.append(f"{key}: expected once, but {self.spelled(name)} is there as well")
      self._rules[name] = rule

  def __getitem__(self, name: str) -> np.ndarray:
    keys = self._keys[name]
    arrays = [None if key is None else np.asarray(self._reader[key]) for key in keys]
    arrays = [np.zeros_like(arrays[0]) if a is None else a for a in arrays]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

  def __iter__(self) -> Iterator[str]:
    return iter(self._keys)

  def __contains__(self, key: object) -> bool:
    return key in self._keys

  def __len__(self) -> int:
    return len(self._keys)

  def stream(self, name: str, dtype: np.dtype) -> Stored:
    """The array as `dtype`; piece by piece, without ever being in memory, where it lies in a file just so."""
    keys = self._keys[name]
    if len(keys) == 1 and self.spec(name).dtype == dtype:
      return stream(self._reader, keys[0])
    return cast(self.spelled(name), self[name], dtype)

  def spec(self, name: str) -> Spec:
    """Shape and dtype, without reading."""
    keys = self._keys[name]
    first = spec(self._reader, keys[0])
    rows = sum(spec(self._reader, key or keys[0]).shape[0] for key in keys) if len(keys) > 1 else None
    return first if rows is None else Spec((rows, *first.shape[1:]), first.dtype)

  def spelled(self, name: str) -> str:
    """The key or keys of the checkpoint behind a name."""
    return " + ".join(key for key in self._keys[name] if key is not None)

  def optional(self, name: str) -> bool:
    """Whether a model without this parameter may pass the key over."""
    return self._rules[name].optional

  def leave_out(self, wanted: Iterable[str]) -> None:
    """Keep only the names in `wanted`."""
    self._keys = {name: self._keys[name] for name in wanted if name in self._keys}


def fit(rules: Sequence[Rule], reader: Mapping[str, Any], abstract: Params) -> tuple[Canonical, list[str]]:
  """Reference weights and everything that keeps them from filling the tree `abstract`; reads no array.

  Keys that a model without that parameter may pass over are left out of the result.
  """
  found = Canonical(rules, reader)
  try:
    wanted = reference_specs(rules, abstract)
  except UserError as error:
    return found, [*found.problems, str(error)]
  problems = []
  for name in found:
    if name not in wanted:
      if found.optional(name):
        found.dropped.append(found.spelled(name))
      else:
        problems.append(f"{found.spelled(name)}: expected no such key (this model has no parameter for it)")
      continue
    have, want = found.spec(name), wanted[name]
    if have.shape != want.shape:
      problems.append(f"{found.spelled(name)}: expected {list(want.shape)}, found {list(have.shape)}")
    elif jnp.issubdtype(want.dtype, jnp.floating) != jnp.issubdtype(have.dtype, jnp.floating):
      kind = "floating-point numbers" if jnp.issubdtype(want.dtype, jnp.floating) else want.dtype.name
      problems.append(f"{found.spelled(name)}: expected {kind}, found {have.dtype.name}")
  problems += [
    f"{name}: expected {list(want.shape)}, found nothing" for name, want in wanted.items() if name not in found
  ]
  found.leave_out(wanted)
  return found, found.problems + problems


def to_ours(
  rules: Sequence[Rule],
  reader: Mapping[str, Any],
  abstract: Params,
  *,
  place: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
  """Fill our parameter tree from reference weights, leaf by leaf (those of a fused matrix together), each array read
  once: peak host memory is the result plus that.

  Args:
    rules: the component's table.
    reader: {reference key: array}, a dict or a `safetensors_io.Reader`.
    abstract: nested dict of `jax.ShapeDtypeStruct` (or arrays); values are cast to its dtypes.
    place: called with (path, array) as each leaf is complete; its result is stored instead, e.g. a `jax.device_put`
      that lets the host copy go.

  Returns:
    The filled tree.

  Raises:
    UserError: unknown or ambiguous keys, unfilled parameters, misfitting shapes: all of them in one message.
  """
  found, problems = fit(rules, reader, abstract)
  tell(problems, "weights do not fit the model")
  return fill(rules, found, abstract, place=place)


def fill(
  rules: Sequence[Rule], found: Canonical, abstract: Params, *, place: Callable[[str, np.ndarray], Any] | None = None
) -> dict[str, Any]:
  """The second half of `to_ours`: from weights that `fit` found to fit."""
  leaves, done = flatten(abstract), {}
  for paths, outputs in itertools.groupby(_outputs(rules, leaves), key=lambda out: out.paths):
    arrays = [np.empty(leaves[path].shape, leaves[path].dtype) for path in paths]
    for out in outputs:
      whole = found[out.key]
      for array, part in zip(arrays, np.split(whole, len(paths)) if len(paths) > 1 else [whole], strict=True):
        array[out.index] = to_ours_array(out.rule.transform, part)
    for path in paths:
      done[path] = arrays.pop(0) if place is None else place(path, arrays.pop(0))
  return unflatten({path: done[path] for path in leaves})


def stored_dtypes(rules: Sequence[Rule], found: Canonical, abstract: Params) -> dict[str, Any]:
  """`abstract` with the dtype in which each leaf is stored: the widest, where its layers differ."""
  leaves, dtypes = flatten(abstract), {}
  for out in _outputs(rules, leaves):
    for path in out.paths if out.key in found else ():
      dtypes[path] = jnp.promote_types(dtypes.get(path, found.spec(out.key).dtype), found.spec(out.key).dtype)
  give = lambda path, x: jax.ShapeDtypeStruct(x.shape, dtypes.get(path, x.dtype), sharding=getattr(x, "sharding", None))
  return unflatten({path: give(path, leaf) for path, leaf in leaves.items()})


def _matches(rules: Sequence[Rule], key: str) -> Iterator[tuple[Rule, str | tuple, dict[str, int]]]:
  for rule in rules:
    for spelling in (rule.source, *rule.aliases):
      names = [s for s in (spelling if isinstance(spelling, tuple) else (spelling,)) if s is not None]
      numbers = next((n for n in (_match(s, key) for s in names) if n is not None), None)
      if numbers is not None:
        yield rule, spelling, numbers
        break


def _reference_shape(rule: Rule, layer_shape: Sequence[int]) -> tuple[int, ...]:
  """Shape that the reference's array must have to become `layer_shape` (no memory is touched: a zero-stride view)."""
  shape = to_reference_array(rule.transform, np.broadcast_to(np.zeros((), np.int8), layer_shape)).shape
  return (shape[0] * len(rule.targets), *shape[1:]) if len(rule.targets) > 1 else shape


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
    if len(rule.stacked) > len(leaf.shape):
      problems.append(f"parameter {path}: expected {len(rule.stacked)} stacked axes, found shape {list(leaf.shape)}")
      continue
    paths = tuple(_fill(target, numbers) for target in rule.targets)
    if absent := [p for p in paths if p not in leaves]:
      problems.append(f"parameter {path}: expected beside it {', '.join(absent)}, found nothing")
    if path != paths[0]:
      continue  # written with the first piece
    for index in itertools.product(*(range(n) for n in leaf.shape[: len(rule.stacked)])):
      key = _fill(rule.source, numbers | dict(zip(rule.stacked, index, strict=True)))
      outputs.append(_Output(key, rule, paths, index))
  tell(problems, "parameters do not fit the table")
  return outputs


def _writers(rules: Sequence[Rule], path: str) -> list[tuple[Rule, dict[str, int]]]:
  return [(r, n) for r in rules for t in r.targets if (n := _match(t, path)) is not None]


def reference_specs(rules: Sequence[Rule], abstract: Params, dtype: Any = None) -> dict[str, Spec]:
  """{reference key: shape and dtype} of a parameter tree, sorted by key; no data is touched.

  Raises:
    UserError: as `to_reference`.
  """
  leaves, specs, problems = flatten(abstract), {}, []
  for out in _by_key(_outputs(rules, leaves)):
    leaf = leaves[out.paths[0]]
    try:
      shape = _reference_shape(out.rule, leaf.shape[len(out.index) :])
    except ValueError as error:
      problems.append(
        f"parameter {out.paths[0]}: expected a shape that fits {out.key}, found {list(leaf.shape)} ({error})"
      )
      continue
    specs[out.key] = Spec(shape, stored_dtype(leaf.dtype, dtype))
  tell(problems, "parameters do not fit the table")
  return specs


def to_reference(rules: Sequence[Rule], params: Params, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
  """Our parameters in the reference's key names and layouts, sorted by key: (key, contiguous array).

  One key's array is on the host at a time. Arrays sharded over several processes are gathered, so then every process
  must run through the iterator.

  Args:
    dtype: what floating-point parameters are cast to; each keeps its own if None.

  Raises:
    UserError: parameters that no rule, or more than one, writes; raised before anything is given out.
  """
  leaves = flatten(params)
  return _stream(leaves, _by_key(_outputs(rules, leaves)), dtype)


class ContentHash:
  """The identity of a component's weights, whatever file or layout they lie in.

  sha256 over the reference's keys in sorted order: name, dtype name and comma-separated shape of each, closed by a zero
  byte, then its C-order little-endian bytes.
  """

  def __init__(self):
    self._digest = hashlib.sha256()

  def begin(self, key: str, spec: Any) -> None:
    """The next array, in sorted order of keys; anything with a shape and a dtype."""
    self._digest.update(f"{key}\0{np.dtype(spec.dtype).name}\0{','.join(map(str, spec.shape))}\0".encode())

  def update(self, piece: memoryview) -> None:
    """The next bytes of that array."""
    self._digest.update(piece)

  def hexdigest(self) -> str:
    """The hash of all that came so far."""
    return self._digest.hexdigest()


def content_hash(arrays: Iterable[tuple[str, Stored]]) -> str:
  """See ContentHash; `arrays` as `to_reference` gives them."""
  digest = ContentHash()
  for key, array in arrays:
    digest.begin(key, array)
    for piece in pieces(array):
      digest.update(piece)
  return digest.hexdigest()


def cast(key: str, array: np.ndarray, dtype: Any) -> np.ndarray:
  """The array, contiguous, floating-point numbers as `dtype` (their own if None).

  Raises:
    UserError: a number that float16, which ends at 65504, would make infinite.
  """
  with np.errstate(over="ignore"):
    out = np.ascontiguousarray(array, stored_dtype(array.dtype, dtype)).reshape(array.shape)
  if out.dtype == np.float16 and np.isinf(out).any() and not np.isinf(array).any():
    raise UserError(f"{key}: has numbers too large for float16; take bfloat16")
  return out


def stored_dtype(dtype: Any, wanted: Any) -> np.dtype:
  """What an array of `dtype` is stored as where floating-point numbers are to be `wanted` (their own if None)."""
  return np.dtype(wanted) if wanted is not None and jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)


def _by_key(outputs: Iterable[_Output]) -> list[_Output]:
  return sorted(outputs, key=lambda out: out.key)


def _stream(leaves: Mapping[str, Any], outputs: Sequence[_Output], dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
  for out in outputs:
    parts = [to_reference_array(out.rule.transform, whole(leaves[path][out.index])) for path in out.paths]
    yield out.key, cast(out.key, parts[0] if len(parts) == 1 else np.concatenate(parts), dtype)
