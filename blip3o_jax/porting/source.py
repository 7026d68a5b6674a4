"""A model to read from, whatever its layout on disk: `locate.open_model` makes one (floor 3)."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from blip3o_jax.data.files import is_remote
from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.blip3o import Blip3o, Blip3oConfig
from blip3o_jax.porting import convert, rules
from blip3o_jax.porting.preprocessor import default_preprocessor
from blip3o_jax.porting.safetensors_io import Spec, Stored, tell
from blip3o_jax.sharding import rules as sharding_rules
from blip3o_jax.types import Params

# What transformers may keep a tokenizer in.
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
  "added_tokens.json",
  "special_tokens_map.json",
  "chat_template.json",
  "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class OrbaxWeights:
  """A component that lies as an Orbax tree, in our own names."""

  path: epath.Path


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights, configuration and what else belongs to one model.

  Attributes:
    name: as the user gave it. path: where it lies.
    preset, overrides: of models.presets.
    weights: {component: reader of reference keys, or OrbaxWeights}.
    entries: what model.json says of each component, of a model directory (its hash is then known without reading).
    tokenizer: the directory that holds one, or None. preprocessor: in the keys of preprocessor_config.json.
    sampling, provenance: see model_dir.Manifest.
  """

  name: str
  path: epath.Path
  preset: str
  overrides: dict[str, Any]
  weights: dict[str, Mapping[str, Any] | OrbaxWeights]
  entries: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  tokenizer: epath.Path | None = None
  preprocessor: dict[str, Any] | None = None
  sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
  provenance: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  _fits: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

  @property
  def components(self) -> tuple[str, ...]:
    return tuple(self.weights)

  def config(self) -> Blip3oConfig:
    """The architecture, overrides applied."""
    return presets.get(self.preset, self.overrides)

  def read(
    self, names: Sequence[str], abstract: Mapping[str, Params] | None = None, *, dtype: Any = None
  ) -> dict[str, Any]:
    """Weights of some components, one leaf on the host at a time.

    Args:
      abstract: {component: tree of ShapeDtypeStruct}: dtype and, if set, sharding of each leaf. None: the shapes of the
        model's own config, float32, default device.
      dtype: overrules the dtype of every leaf.

    Returns:
      {component: tree of jax.Array}.

    Raises:
      UserError: a component is not there, is damaged, or does not fit `abstract`; what is wrong with all of them.
    """
    for name in names:
      self._weights(name)
    own = abstract is None
    abstract = abstract_params(self.config(), names) if own else abstract
    fits = {
      name: self._fit(name) if own else convert.fit(self._table(name), self.weights[name], abstract[name])
      for name in names
      if not isinstance(self.weights[name], OrbaxWeights)  # such a tree is checked when it is read
    }
    tell([problem for _, problems in fits.values() for problem in problems], f"{self.name} does not fit the model")
    params = {}
    for name in names:
      give = lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding)
      tree, found = jax.tree.map(give, abstract[name]), self.weights[name]
      orbax = isinstance(found, OrbaxWeights)
      params[name] = _read_orbax(found.path, tree) if orbax else _fill(self._table(name), fits[name][0], tree)
    return params

  def check(self, names: Sequence[str] | None = None) -> None:
    """Whether keys and shapes fit the configuration (Orbax trees are checked when read). Raises UserError."""
    names = self.components if names is None else names
    read = [name for name in names if not isinstance(self.weights[name], OrbaxWeights)]
    problems = [problem for name in read for problem in self._fit(name)[1]]
    tell(problems, f"{self.name} does not fit the model")

  def reference(self, name: str, dtype: Any = None) -> tuple[dict[str, Spec], Iterator[tuple[str, Stored]]]:
    """A component in the reference's names, sorted: shapes and dtypes, and the arrays as they are read one by one.

    Args:
      dtype: what floating-point numbers become; None: as they are stored.

    Raises:
      UserError: it does not fit the configuration.
    """
    table, found = self._table(name), self._weights(name)
    if isinstance(found, OrbaxWeights):
      tree = self.read_as_stored(name)
      return convert.reference_specs(table, tree, dtype), convert.to_reference(table, tree, dtype)
    weights, problems = self._fit(name)
    tell(problems, f"{self.name} does not fit the model")
    specs = {key: weights.spec(key) for key in sorted(weights)}
    specs = {key: Spec(spec.shape, convert.stored_dtype(spec.dtype, dtype)) for key, spec in specs.items()}
    return specs, ((key, weights.stream(key, spec.dtype)) for key, spec in specs.items())

  def read_as_stored(self, name: str) -> Params:
    """A component as `read` gives it, each leaf in the dtype in which it is stored (the widest of its layers)."""
    found, abstract = self._weights(name), abstract_params(self.config(), (name,))[name]
    if isinstance(found, OrbaxWeights):
      stored = _stored_dtypes(found.path, abstract)
    else:
      stored = convert.stored_dtypes(self._table(name), self._fit(name)[0], abstract)
    return self.read((name,), {name: stored})[name]

  def dropped(self) -> list[str]:
    """Keys that are knowingly left out."""
    read = [name for name, found in self.weights.items() if not isinstance(found, OrbaxWeights)]
    return [key for name in read for key in self._fit(name)[0].dropped]

  def content_hash(self, name: str) -> str:
    """The content hash of a component; weights in the release's layout do not state it, so they are read."""
    self._weights(name)
    return self.entries[name]["hash"] if name in self.entries else convert.content_hash(self.reference(name)[1])

  def tokenizer_dir(self) -> Path:
    """A local directory with the tokenizer alone. Raises UserError if there is none."""
    if self.tokenizer is None:
      raise UserError(f"{self.name}: no tokenizer in this model; copy one into {self.path / 'tokenizer'}")
    files = [self.tokenizer / name for name in TOKENIZER_FILES if (self.tokenizer / name).exists()]
    others = is_remote(self.tokenizer) or (self.tokenizer / "config.json").exists()
    if not others:
      return Path(self.tokenizer)
    # Beside a config.json transformers would ask that file for the model's kind, and not know it.
    local = tempfile.mkdtemp(prefix="blip3o_tokenizer_")
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    for file in files:
      file.copy(Path(local) / file.name)
    return Path(local)

  def image_preprocessor(self) -> dict[str, Any]:
    """How pictures enter the understanding tower, in the keys of the reference's preprocessor_config.json."""
    return self.preprocessor or default_preprocessor(self.config())

  def _fit(self, name: str) -> tuple[convert.Canonical, list[str]]:
    """The weights of a component under canonical names, and what keeps them from fitting the configuration."""
    if name not in self._fits:
      abstract = abstract_params(self.config(), (name,))[name]
      self._fits[name] = convert.fit(self._table(name), self.weights[name], abstract)
    return self._fits[name]

  def _table(self, name: str) -> Sequence[convert.Rule]:
    return rules.get(name, self.config())

  def _weights(self, name: str) -> Mapping[str, Any] | OrbaxWeights:
    if name not in self.weights:
      raise UserError(f"{self.name} has no component {name!r}; it has {', '.join(self.weights) or 'none'}")
    return self.weights[name]


def abstract_params(
  config: Blip3oConfig, names: Sequence[str], dtype: Any = None, mesh: jax.sharding.Mesh | None = None
) -> dict[str, Any]:
  """{component: nested dict of ShapeDtypeStruct}, in float32 or `dtype`; with a mesh, sharded by the rules."""
  params = {}
  for name in names:
    boxed = _shapes(config, name)
    tree = nn.unbox(boxed) if mesh is None else sharding_rules.placed(mesh, boxed)
    give = lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding)
    params[name] = jax.tree.map(give, tree)
  return params


@functools.lru_cache(maxsize=64)  # tracing the largest component takes seconds
def _shapes(config: Blip3oConfig, name: str) -> Params:
  return jax.eval_shape(lambda: Blip3o(config).init_components(jax.random.key(0), (name,)))[name]


def _fill(table: Sequence[convert.Rule], found: convert.Canonical, abstract: Params) -> dict[str, Any]:
  """A component from weights that fit, each leaf put where `abstract` says."""
  leaves = convert.flatten(abstract)

  def place(path: str, array: np.ndarray) -> jax.Array:
    sharding = leaves[path].sharding
    if sharding is None:
      return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return convert.fill(table, found, abstract, place=place)


def _read_orbax(where: epath.Path, abstract: Params) -> dict[str, Any]:
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default), abstract)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(where, abstract)
  except (ValueError, KeyError, OSError) as error:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"{where}: damaged, or of another model ({first[:100]})") from error


def _stored_dtypes(where: epath.Path, abstract: Params) -> Params:
  """`abstract` with the dtypes that an Orbax tree was saved in."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      stored = checkpointer.metadata(where).item_metadata.tree
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, s.dtype, sharding=x.sharding), abstract, stored)
  except (ValueError, KeyError, OSError, AttributeError) as error:
    raise UserError(f"{where}: damaged, or of another model; copy it again") from error
