"""A model directory: what a finished run leaves, `load` opens and `--model` takes (DESIGN part 3; floor 3).

model.json             preset and overrides, content hash of each component, sampling defaults, provenance
weights/<component>/   model.safetensors in the reference's key names, or an Orbax tree in ours
tokenizer/             as transformers reads it
preprocessor.json      as ImageProcessor.from_reference reads it
"""

import contextlib
import dataclasses
import importlib.resources
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.blip3o import CLIP_MEAN, CLIP_STD, Blip3o, Blip3oConfig
from blip3o_jax.porting import convert, rules, safetensors_io
from blip3o_jax.sharding.distributed import barrier
from blip3o_jax.types import Params

FORMAT_VERSION = 1
FORMATS = ("safetensors", "orbax")
BUNDLED = ("micro",)
_MANIFEST, _WEIGHTS, _TOKENIZER, _PREPROCESSOR = "model.json", "weights", "tokenizer", "preprocessor.json"
_SAFETENSORS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Manifest:
  """model.json.

  Attributes:
    components: {name: {"format", "hash" (sha256, see convert.content_hash), "dtype", "parameters"}}.
    sampling: defaults for drawing (steps, guidance, ...); what is absent has the sampler's own default.
    provenance: one dict a training stage, oldest first: command, machine, seed, time, scores.
  """

  preset: str
  overrides: dict[str, Any]
  components: dict[str, dict[str, Any]]
  sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
  provenance: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  format_version: int = FORMAT_VERSION

  def config(self) -> Blip3oConfig:
    """The architecture, overrides applied."""
    return presets.get(self.preset, self.overrides)


# ---- reading ----


def resolve(name_or_path: os.PathLike | str) -> epath.Path:
  """The model directory behind a bundled name ("micro"), a local path or a gs:// path.

  Raises:
    UserError: it is none.
  """
  bundled = os.fspath(name_or_path) in BUNDLED
  assets = importlib.resources.files("blip3o_jax") / "assets"
  path = epath.Path(os.fspath(assets / os.fspath(name_or_path))) if bundled else epath.Path(name_or_path).expanduser()
  if (path / _MANIFEST).exists():
    return path
  if bundled:
    raise UserError(f"the bundled model {name_or_path!r} is missing from this installation; install the package again")
  if not path.exists():
    names = ", ".join(BUNDLED)
    raise UserError(f"{name_or_path}: no such model; give a directory with {_MANIFEST}, or a bundled name ({names})")
  raise UserError(f"{name_or_path}: not a model directory (no {_MANIFEST}); `blip3o convert` makes one of a release")


def read_manifest(directory: os.PathLike | str) -> Manifest:
  """What `model.json` of a model directory (or of a bundled name) says.

  Raises:
    UserError: not a model directory, or its model.json cannot be read.
  """
  path = resolve(directory) / _MANIFEST
  try:
    content = json.loads(path.read_text())
    version = content["format_version"]
    if version > FORMAT_VERSION:
      raise UserError(f"{path}: format version {version}, this program reads up to {FORMAT_VERSION}; update blip3o_jax")
    known = {field.name for field in dataclasses.fields(Manifest)}
    return Manifest(**{name: value for name, value in content.items() if name in known})
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); copy the model again") from error


def components(directory: os.PathLike | str) -> tuple[str, ...]:
  """Names of the components that a model directory holds."""
  return tuple(read_manifest(directory).components)


def content_hash(directory: os.PathLike | str, component: str) -> str:
  """The hash of a component as its model directory states it."""
  return _entry(read_manifest(directory), directory, component)["hash"]


def tokenizer_path(directory: os.PathLike | str) -> epath.Path:
  """The tokenizer of a model directory. Raises UserError if it has none."""
  path = resolve(directory) / _TOKENIZER
  if not path.is_dir():
    raise UserError(f"{directory}: no {_TOKENIZER}/ in this model directory; copy one in")
  return path


def read_preprocessor(directory: os.PathLike | str) -> dict[str, Any]:
  """preprocessor.json of a model directory, in the keys of the reference's preprocessor_config.json."""
  path = resolve(directory) / _PREPROCESSOR
  try:
    return json.loads(path.read_text()) if path.exists() else default_preprocessor(read_manifest(directory).config())
  except ValueError as error:
    raise UserError(f"{path}: not JSON ({error}); copy the model again") from error


def abstract_params(config: Blip3oConfig, names: Sequence[str], dtype: Any = None) -> dict[str, Any]:
  """{component: nested dict of ShapeDtypeStruct}, in float32 or `dtype`."""
  shapes = jax.eval_shape(lambda: nn.unbox(Blip3o(config).init_components(jax.random.key(0), tuple(names))))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), shapes)


def read_components(
  directory: os.PathLike | str,
  names: Sequence[str],
  abstract: Mapping[str, Params] | None = None,
  *,
  dtype: Any = None,
  shardings: Any = None,
) -> dict[str, Any]:
  """Weights of some components, one leaf on the host at a time.

  Args:
    directory: a model directory or bundled name.
    names: components to read.
    abstract: {component: tree of ShapeDtypeStruct}: dtype and, if set, sharding of each leaf. None: the shapes of the
      directory's own config, float32, default device.
    dtype: overrules the dtype of every leaf.
    shardings: {component: tree of Sharding}, overrules those of `abstract`.

  Returns:
    {component: tree of jax.Array}.

  Raises:
    UserError: a component is not there, is damaged, or does not fit `abstract`.
  """
  root, manifest = resolve(directory), read_manifest(directory)
  entries = {name: _entry(manifest, directory, name) for name in names}
  abstract = abstract_params(manifest.config(), names) if abstract is None else abstract
  params = {}
  for name in names:
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding), abstract[name])
    if shardings is not None:
      put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
      tree = jax.tree.map(put, tree, shardings[name])
    where = root / _WEIGHTS / name
    if entries[name]["format"] == "orbax":
      params[name] = _read_orbax(where, tree)
    else:
      params[name] = read_reference(name, safetensors_io.open_weights(where / _SAFETENSORS), tree)
  return params


def read_reference(component: str, reader: Mapping[str, Any], abstract: Params) -> dict[str, Any]:
  """One component from reference weights, each leaf put where `abstract` says. Raises UserError if it does not fit."""
  leaves = convert.flatten(abstract)

  def place(path: str, array: np.ndarray) -> jax.Array:
    sharding = leaves[path].sharding
    if sharding is None:
      return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return convert.to_ours(rules.get(component), reader, abstract, place=place)


def _read_orbax(where: epath.Path, abstract: Params) -> dict[str, Any]:
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default), abstract)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(where, abstract)
  except (ValueError, KeyError, OSError) as error:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"{where}: damaged, or of another model ({first[:100]})") from error


def _entry(manifest: Manifest, directory: Any, name: str) -> dict[str, Any]:
  if name not in manifest.components:
    raise UserError(f"{directory} has no component {name!r}; it has {', '.join(manifest.components) or 'none'}")
  return manifest.components[name]


# ---- writing ----


def default_preprocessor(config: Blip3oConfig) -> dict[str, Any]:
  """What the understanding tower of `config` wants, with the limits of Qwen2.5-VL in merged patches (spec 4.5)."""
  vision = config.backbone.vision
  block = (vision.patch_size * vision.merge_size) ** 2
  return {
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "patch_size": vision.patch_size,
    "merge_size": vision.merge_size,
    "temporal_patch_size": vision.temporal_patch_size,
    "min_pixels": 4 * block,
    "max_pixels": 16384 * block,
  }


def write(
  directory: os.PathLike | str,
  *,
  preset: str,
  overrides: Mapping[str, Any] | None = None,
  params: Mapping[str, Params],
  format: str = "safetensors",
  dtype: Any = None,
  carry_from: os.PathLike | str | None = None,
  tokenizer_dir: os.PathLike | str | None = None,
  preprocessor: Mapping[str, Any] | None = None,
  sampling: Mapping[str, Any] | None = None,
  provenance: Mapping[str, Any] | None = None,
) -> epath.Path:
  """Write a model directory; it appears complete or not at all. Every process of a job must call this.

  Args:
    params: {component: tree of arrays}.
    format: "safetensors" (reference key names) or "orbax", for the components in `params`.
    dtype: what floating-point parameters are stored as; their own if None.
    carry_from: a model directory whose other components (hard-linked where possible), tokenizer, preprocessor, sampling
      defaults and provenance are taken over where not given here.
    sampling: added to the carried defaults. provenance: of this stage, appended to the carried ones.

  Returns:
    The directory.

  Raises:
    UserError: unknown format or component, something else lies at `directory`, no space.
  """
  target = epath.Path(directory)
  if format not in FORMATS:
    raise UserError(f"weight format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
  presets.get(preset, overrides)  # raises on a config that could not be read back
  if target.exists() and not (target / _MANIFEST).exists() and any(target.iterdir()):
    raise UserError(f"{target}: not empty and not a model directory; choose another place")
  main = jax.process_index() == 0
  old = source = None
  if carry_from:
    source, old = resolve(carry_from), read_manifest(carry_from)

  temporary = target.parent / f".{target.name}.tmp"  # the same on every process
  with _writing(target, temporary, main):
    if main:
      temporary.rmtree(missing_ok=True)
      (temporary / _WEIGHTS).mkdir(parents=True)
    barrier(f"{target}: start")
    entries = {name: _write_component(temporary, name, tree, format, dtype) for name, tree in params.items()}
    if main:
      for name in old.components if old else ():
        if name not in entries:
          _take_tree(source / _WEIGHTS / name, temporary / _WEIGHTS / name, link=True)
          entries[name] = old.components[name]
      tokenizer = tokenizer_dir or (source / _TOKENIZER if source else None)
      if tokenizer is not None and epath.Path(tokenizer).is_dir():
        _take_tree(epath.Path(tokenizer), temporary / _TOKENIZER)
      elif tokenizer_dir is not None:
        raise UserError(f"{tokenizer_dir}: no such tokenizer directory")
      if preprocessor is None:
        preprocessor = read_preprocessor(carry_from) if old else default_preprocessor(presets.get(preset, overrides))
      (temporary / _PREPROCESSOR).write_text(json.dumps(dict(preprocessor), indent=2) + "\n")
      manifest = Manifest(
        preset=preset,
        overrides=_plain(overrides or {}),
        components=entries,
        sampling=(old.sampling if old else {}) | _plain(sampling or {}),
        provenance=(old.provenance if old else []) + ([_plain(provenance)] if provenance else []),
      )
      _write_manifest(temporary, manifest)
      _swap(temporary, target)
    barrier(f"{target}: done")
  return target


def convert_dir(
  source: os.PathLike | str, directory: os.PathLike | str, *, format: str = "safetensors", dtype: Any = None
) -> epath.Path:
  """Write a model directory again, all its components in one format and, if given, one dtype.

  Without `dtype` every component keeps its numbers, and so its content hash.

  Raises:
    UserError: as `write`.
  """
  manifest, params = read_manifest(source), {}
  for name, entry in manifest.components.items():
    kept = None if "+" in entry["dtype"] else jnp.dtype(entry["dtype"])  # several: float32 holds them all
    params |= read_components(source, (name,), dtype=kept)
  return write(
    directory,
    preset=manifest.preset,
    overrides=manifest.overrides,
    params=params,
    format=format,
    dtype=None if dtype is None else jnp.dtype(dtype),
    carry_from=source,
  )


def annotate(
  directory: os.PathLike | str,
  *,
  sampling: Mapping[str, Any] | None = None,
  provenance: Mapping[str, Any] | None = None,
) -> None:
  """Add sampling defaults, or facts (scores) to the newest provenance entry, of an existing model directory."""
  manifest, path = read_manifest(directory), resolve(directory)
  *earlier, last = manifest.provenance or [{}]
  entries = [*earlier, last | _plain(provenance)] if provenance else manifest.provenance
  sampling = manifest.sampling | _plain(sampling or {})
  _write_manifest(path, dataclasses.replace(manifest, sampling=sampling, provenance=entries))


def _write_component(root: epath.Path, name: str, tree: Params, format: str, dtype: Any) -> dict[str, Any]:
  """Write one component; the manifest's entry about it."""
  table, where = rules.get(name), root / _WEIGHTS / name
  specs = convert.reference_specs(table, tree, dtype)
  main = jax.process_index() == 0
  if format == "orbax":
    if dtype is not None:
      tree = jax.tree.map(lambda x: jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), tree)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(where, jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), tree))
  else:
    arrays = convert.to_reference(table, tree, dtype)
    if main:
      where.mkdir(parents=True)
      _write_safetensors(where / _SAFETENSORS, specs, arrays)
    else:
      for _ in arrays:  # gathering needs every process
        pass
  return {
    "format": format,
    "hash": convert.content_hash(table, tree, dtype),
    "dtype": "+".join(sorted({np.dtype(spec.dtype).name for spec in specs.values()})),
    "parameters": sum(int(np.prod(spec.shape)) for spec in specs.values()),
  }


def _write_safetensors(path: epath.Path, specs: Mapping, arrays: Iterator) -> None:
  if "://" not in os.fspath(path):
    return safetensors_io.write(path, specs, arrays)
  with tempfile.TemporaryDirectory() as local:  # a bucket has no rename: write here, then copy
    safetensors_io.write(f"{local}/{_SAFETENSORS}", specs, arrays)
    epath.Path(f"{local}/{_SAFETENSORS}").copy(path)


def _write_manifest(directory: epath.Path, manifest: Manifest) -> None:
  temporary = directory / f".{_MANIFEST}.tmp"
  temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
  temporary.replace(directory / _MANIFEST)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
  """The same as JSON gives it back (tuples are lists, a ConfigDict is a dict)."""
  value = value.to_dict() if hasattr(value, "to_dict") else dict(value)
  return json.loads(json.dumps(value, default=lambda x: x.to_dict() if hasattr(x, "to_dict") else str(x)))


def _take_tree(source: epath.Path, target: epath.Path, *, link: bool = False) -> None:
  """Copy a directory; `link`: hard links where both lie on one file system (weights are replaced, never changed)."""
  target.mkdir(parents=True, exist_ok=True)
  remote = "://" in os.fspath(source) + os.fspath(target)
  for item in source.iterdir():
    if item.is_dir():
      _take_tree(item, target / item.name, link=link)
    elif remote:
      item.copy(target / item.name)
    else:
      linked = False
      if link:
        with contextlib.suppress(OSError):  # another file system, or one without hard links
          os.link(os.path.realpath(item), target / item.name)
          linked = True
      if not linked:
        shutil.copyfile(item, target / item.name)


def _swap(temporary: epath.Path, target: epath.Path) -> None:
  """Put `temporary` in the place of `target`. A directory cannot be replaced in one step: the old one is moved away."""
  if not target.exists():
    temporary.rename(target)
    return
  old = target.parent / f".{target.name}.old"
  old.rmtree(missing_ok=True)
  target.rename(old)
  temporary.rename(target)
  old.rmtree()


@contextlib.contextmanager
def _writing(target: epath.Path, temporary: epath.Path, main: bool) -> Iterator[None]:
  """Nothing half written stays, and trouble of the disk is told in one line."""
  try:
    yield
  except OSError as error:
    why = error.strerror or error
    raise UserError(f"{target}: cannot write the model ({why}); free space or choose another place") from error
  finally:
    if main:
      with contextlib.suppress(OSError):
        temporary.rmtree(missing_ok=True)
