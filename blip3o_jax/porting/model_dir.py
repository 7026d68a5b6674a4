"""A model directory: what a finished run leaves, `load` opens and `--model` takes (DESIGN part 3; floor 3).

model.json             preset and overrides, content hash of each component, sampling defaults, provenance
weights/<component>/   model.safetensors in the reference's key names, or an Orbax tree in ours
tokenizer/             as transformers reads it
preprocessor.json      as porting.preprocessor reads it
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from blip3o_jax.data.files import is_remote, reading
from blip3o_jax.data.outputs import write_atomically
from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.porting import convert, rules, safetensors_io
from blip3o_jax.porting.preprocessor import default_preprocessor
from blip3o_jax.porting.safetensors_io import Spec, Stored, Stream, pieces
from blip3o_jax.porting.source import TOKENIZER_FILES, OrbaxWeights, Source
from blip3o_jax.sharding.distributed import barrier
from blip3o_jax.types import Params

FORMAT_VERSION = 1
FORMATS = ("safetensors", "orbax")
MANIFEST = "model.json"
_WEIGHTS, _TOKENIZER, _PREPROCESSOR = "weights", "tokenizer", "preprocessor.json"
_SAFETENSORS = "model.safetensors"
INCOMPLETE = ".incomplete"  # lies in a directory of a bucket while it is replaced


@dataclasses.dataclass(frozen=True)
class Manifest:
  """model.json.

  Attributes:
    components: {name: {"format", "hash" (sha256, see convert.ContentHash), "dtype", "parameters"}}.
    sampling: defaults for drawing (steps, guidance, ...); what is absent has the sampler's own default.
    provenance: one dict a training stage, oldest first: command, machine, seed, time, scores.
  """

  preset: str
  overrides: dict[str, Any]
  components: dict[str, dict[str, Any]]
  sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
  provenance: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  format_version: int = FORMAT_VERSION


# ---- reading ----


def read_manifest(directory: os.PathLike | str) -> Manifest:
  """What `model.json` of a model directory says. Raises UserError if it is not there or cannot be read."""
  path = epath.Path(directory) / MANIFEST
  try:
    content = json.loads(path.read_text())
    version = content["format_version"]
    if version > FORMAT_VERSION:
      raise UserError(f"{path}: format version {version}, this program reads up to {FORMAT_VERSION}; update blip3o_jax")
    known = {field.name for field in dataclasses.fields(Manifest)}
    return Manifest(**{name: value for name, value in content.items() if name in known})
  except FileNotFoundError as error:
    raise UserError(f"{directory}: not a model directory (no {MANIFEST})") from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); copy the model again") from error


def open_directory(directory: os.PathLike | str, name: str = "") -> Source:
  """The model in a model directory; `name` is what messages call it. Raises UserError if it is damaged."""
  root, manifest = epath.Path(directory), read_manifest(directory)
  weights = {}
  for component, entry in manifest.components.items():
    where, orbax = root / _WEIGHTS / component, entry.get("format") == "orbax"
    weights[component] = OrbaxWeights(where) if orbax else safetensors_io.open_weights(where / _SAFETENSORS)
  preprocessor = root / _PREPROCESSOR
  try:
    content = json.loads(preprocessor.read_text()) if preprocessor.exists() else None
  except ValueError as error:
    raise UserError(f"{preprocessor}: not JSON ({error}); copy the model again") from error
  return Source(
    name=name or os.fspath(directory),
    path=root,
    preset=manifest.preset,
    overrides=manifest.overrides,
    weights=weights,
    entries=manifest.components,
    tokenizer=root / _TOKENIZER if (root / _TOKENIZER).is_dir() else None,
    preprocessor=content,
    sampling=manifest.sampling,
    provenance=manifest.provenance,
  )


# ---- writing ----


def write(
  directory: os.PathLike | str,
  *,
  preset: str,
  overrides: Mapping[str, Any] | None = None,
  params: Mapping[str, Params],
  format: str = "safetensors",
  dtype: Any = None,
  carry_from: Source | None = None,
  rewrite: bool = False,
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
    carry_from: a model whose other components (as they are; hard-linked where possible), tokenizer, preprocessor,
      sampling defaults and provenance are taken over where not given here.
    rewrite: write the carried components in `format` and `dtype` too.
    sampling: added to the carried defaults. provenance: of this stage, appended to the carried ones.

  Returns:
    The directory.

  Raises:
    UserError: unknown format or component, something else lies at `directory`, no space.
  """
  if format not in FORMATS:
    raise UserError(f"weight format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
  config = presets.get(preset, overrides)  # raises on a config that could not be read back
  old, main = carry_from, jax.process_index() == 0
  with replacing(directory, MANIFEST, _WEIGHTS, _TOKENIZER, _PREPROCESSOR) as temporary:
    entries = {name: _write_params(temporary, name, config, tree, format, dtype) for name, tree in params.items()}
    if main:
      for name in old.components if old else ():
        if name not in entries:
          entries[name] = _rewrite(temporary, name, old, format, dtype) if rewrite else _carry(temporary, name, old)
      tokenizer = tokenizer_dir or (old.tokenizer_dir() if old and old.tokenizer else None)
      if tokenizer is not None:
        take_tokenizer(tokenizer, temporary / _TOKENIZER)
      if preprocessor is None:
        preprocessor = old.image_preprocessor() if old else default_preprocessor(config)
      (temporary / _PREPROCESSOR).write_text(json.dumps(dict(preprocessor), indent=2) + "\n")
      _write_manifest(
        temporary,
        Manifest(
          preset=preset,
          overrides=plain(overrides or {}),
          components=entries,
          sampling=(old.sampling if old else {}) | plain(sampling or {}),
          provenance=(old.provenance if old else []) + ([plain(provenance)] if provenance else []),
        ),
      )
  return epath.Path(directory)


def convert_model(
  source: Source, directory: os.PathLike | str, *, format: str = "safetensors", dtype: Any = None
) -> epath.Path:
  """Write a model as a model directory, all its components in one format and, if given, one dtype.

  Without `dtype` every component keeps its numbers, and so its content hash. To safetensors one array is on the host at
  a time; to Orbax one component.

  Raises:
    UserError: as `write`; whatever does not fit in any component, before anything is written.
  """
  source.check()
  return write(
    directory,
    preset=source.preset,
    overrides=source.overrides,
    params={},
    format=format,
    dtype=dtype,
    carry_from=source,
    rewrite=True,
  )


def annotate(
  directory: os.PathLike | str,
  *,
  sampling: Mapping[str, Any] | None = None,
  provenance: Mapping[str, Any] | None = None,
) -> None:
  """Add sampling defaults, or facts (scores) to the newest provenance entry, of an existing model directory."""
  manifest = read_manifest(directory)
  *earlier, last = manifest.provenance or [{}]
  entries = [*earlier, last | plain(provenance)] if provenance else manifest.provenance
  sampling = manifest.sampling | plain(sampling or {})
  _write_manifest(epath.Path(directory), dataclasses.replace(manifest, sampling=sampling, provenance=entries))


def _write_params(
  root: epath.Path, name: str, config: Blip3oConfig, tree: Params, format: str, dtype: Any
) -> dict[str, Any]:
  """Write one component from a tree of arrays; the manifest's entry about it."""
  table = rules.get(name, config)
  specs, arrays = convert.reference_specs(table, tree, dtype), convert.to_reference(table, tree, dtype)
  if format == "safetensors":
    return _write_arrays(root, name, specs, arrays)
  with ocp.StandardCheckpointer() as checkpointer:
    stored = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), tree)
    if dtype is not None:
      stored = jax.tree.map(lambda x: x.astype(convert.stored_dtype(x.dtype, dtype)), stored)
    checkpointer.save(root / _WEIGHTS / name, stored)
  return _entry(format, specs, convert.content_hash(arrays))


def _write_arrays(root: epath.Path, name: str, specs: Mapping[str, Spec], arrays: Iterable) -> dict[str, Any]:
  """Write one component from arrays in the reference's names, one on the host at a time; the manifest's entry."""
  if jax.process_index():
    for _ in arrays:  # gathering needs every process
      pass
    return {}
  digest, where = convert.ContentHash(), root / _WEIGHTS / name
  where.mkdir(parents=True)
  with concurrent.futures.ThreadPoolExecutor(1) as pool, local(where / _SAFETENSORS) as path:

    def hashed() -> Iterator[tuple[str, Stream]]:
      for key, array in arrays:
        digest.begin(key, array)
        yield key, Stream(array.shape, array.dtype, beside(array))

    def beside(array: Stored) -> Iterator[memoryview]:
      """Hash each piece while it is written and the next one is read: that takes about as long."""
      job = None
      for piece in pieces(array):
        if job:
          job.result()
        job = pool.submit(digest.update, piece)
        yield piece
      if job:
        job.result()

    safetensors_io.write(path, specs, hashed())
  return _entry("safetensors", specs, digest.hexdigest())


def _entry(format: str, specs: Mapping[str, Spec], digest: str) -> dict[str, Any]:
  return {
    "format": format,
    "hash": digest,
    "dtype": "+".join(sorted({spec.dtype.name for spec in specs.values()})),
    "parameters": sum(math.prod(spec.shape) for spec in specs.values()),
  }


def _carry(root: epath.Path, name: str, source: Source) -> dict[str, Any]:
  """A component of another model as it is: linked, if it lies in a model directory."""
  if name not in source.entries:
    return _write_arrays(root, name, *source.reference(name))
  _take_tree(source.path / _WEIGHTS / name, root / _WEIGHTS / name)
  return source.entries[name]


def _rewrite(root: epath.Path, name: str, source: Source, format: str, dtype: Any) -> dict[str, Any]:
  """A component of another model written anew."""
  if format == "orbax":
    return _write_params(root, name, source.config(), source.read_as_stored(name), format, dtype)
  return _write_arrays(root, name, *source.reference(name, dtype))


@contextlib.contextmanager
def local(path: epath.Path) -> Iterator[epath.Path]:
  """`path`, or where it is in a bucket, which has no rename, a local file that is copied there in the end."""
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    yield epath.Path(folder) / path.name
    (epath.Path(folder) / path.name).copy(path)


def _write_manifest(directory: epath.Path, manifest: Manifest) -> None:
  write_atomically(directory / MANIFEST, (json.dumps(dataclasses.asdict(manifest), indent=2) + "\n").encode())


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
  """The same as JSON gives it back (tuples are lists, a ConfigDict is a dict)."""
  value = value.to_dict() if hasattr(value, "to_dict") else dict(value)
  return json.loads(json.dumps(value, default=lambda x: x.to_dict() if hasattr(x, "to_dict") else str(x)))


def take_tokenizer(source: os.PathLike | str, target: epath.Path) -> None:
  """Copy the files of a tokenizer. Raises UserError if `source` is no directory."""
  source = epath.Path(source)
  if not source.is_dir():
    raise UserError(f"{source}: no such tokenizer directory")
  target.mkdir(parents=True, exist_ok=True)
  for name in TOKENIZER_FILES:
    if (source / name).exists():
      (source / name).copy(target / name)


def _take_tree(source: epath.Path, target: epath.Path) -> None:
  """Copy a directory, by hard links where both lie on one file system (weights are replaced, never changed)."""
  target.mkdir(parents=True, exist_ok=True)
  remote = is_remote(source) or is_remote(target)
  for item in source.iterdir():
    if item.is_dir():
      _take_tree(item, target / item.name)
    elif remote:
      item.copy(target / item.name)
    else:
      try:
        os.link(os.path.realpath(item), target / item.name)
      except OSError:  # another file system, or one without hard links
        shutil.copyfile(item, target / item.name)


# ---- all or nothing ----


@contextlib.contextmanager
def replacing(directory: os.PathLike | str, mark: str, *own: str) -> Iterator[epath.Path]:
  """A temporary directory that takes the place of `directory` if the block ends well, and vanishes if not.

  Every process of a job must enter; the first one moves. A bucket has no rename: there `mark` goes first and comes
  last, so that whatever lies beside it is complete.

  Args:
    mark: a file that must be in a directory that is already there and not empty, or it is left alone.
    own: patterns ("*.safetensors", "a/*/b.json") of what else the writer may leave; if anything else lies in the
      directory, it is left alone too. What is below a matching directory is not looked at.

  Raises:
    UserError: something else lies there; trouble of the disk.
  """
  # What a link points at is replaced, not the link.
  target = epath.Path(directory if is_remote(directory) else os.path.realpath(directory))
  temporary = target.parent / f".{target.name}.tmp"  # the same on every process
  main = jax.process_index() == 0
  with reading(os.fspath(target)):
    _check_ours(target, mark, own)
  try:
    if main:
      temporary.rmtree(missing_ok=True)
      temporary.mkdir(parents=True)
    barrier(f"{target}: start")
    yield temporary
    if main and is_remote(target):
      _swap_in_bucket(temporary, target, mark)
    elif main:
      _swap(temporary, target)
    barrier(f"{target}: done")
  except OSError as error:
    why = error.strerror or error
    raise UserError(f"{target}: cannot write the model ({why}); free space or choose another place") from error
  finally:
    if main:
      with contextlib.suppress(OSError):
        temporary.rmtree(missing_ok=True)


def _check_ours(target: epath.Path, mark: str, own: Iterable[str]) -> None:
  """That nothing would be lost but what the writer once left, or half of it."""
  if not target.exists():
    return
  if not target.is_dir():
    raise UserError(f"{target}: is a file; choose another place")
  if not any((target / name).exists() for name in (mark, INCOMPLETE)) and any(target.iterdir()):
    raise UserError(f"{target}: not empty and not a model directory; choose another place")
  if stranger := _stranger(target, {mark, INCOMPLETE, *own}):
    raise UserError(f"{target}: holds {stranger}, which is no part of a model and would be lost; choose another place")


def _stranger(directory: epath.Path, own: Iterable[str], above: str = "") -> str | None:
  """The first file below `directory` that no pattern names."""
  for item in sorted(directory.iterdir()):
    name = f"{above}/{item.name}"
    if any(PurePosixPath(name).match(f"/{pattern}") for pattern in own):
      continue
    if not item.is_dir():
      return name[1:]
    if stranger := _stranger(item, own, name):
      return stranger
  return None


def _swap(temporary: epath.Path, target: epath.Path) -> None:
  """Put `temporary` in the place of `target`. A directory cannot be replaced in one step: the old one is moved away."""
  old = target.parent / f".{target.name}.old"
  old.rmtree(missing_ok=True)
  if target.exists():
    target.rename(old)
  temporary.rename(target)
  old.rmtree(missing_ok=True)


def _swap_in_bucket(temporary: epath.Path, target: epath.Path, mark: str) -> None:
  """The same where files are moved one by one, and the program may be killed at any of them."""
  (target / INCOMPLETE).write_text("being written; if nothing writes it any more, write it again\n")
  for item in sorted(target.iterdir(), key=lambda item: item.name != mark):
    if item.name != INCOMPLETE:
      item.rmtree()
  for item in sorted(temporary.iterdir(), key=lambda item: item.name == mark):
    item.rename(target / item.name)
  (target / INCOMPLETE).unlink()
