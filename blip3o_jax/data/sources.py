"""What a path of a config means: random access to samples, wherever and however they are stored.

`open_source` is the one way in. Every source has a length, and gives records: dicts of undecoded bytes with "image"
(bytes, or None), "text" (str, where there is one), "name" (what to call the sample), and what else a row holds, such as
"conversations". What is wrong with the files as a whole is a UserError when a source is opened; what is wrong with one
sample is a UserError when it is read, and data.pipeline puts another sample in its place.
"""

import bisect
import dataclasses
import json
import os
from typing import BinaryIO, Protocol

import msgpack
import numpy as np

from blip3o_jax.data import files
from blip3o_jax.data.features import MANIFEST, FeatureSource
from blip3o_jax.data.records import Records, open_records
from blip3o_jax.data.tars import TarSource
from blip3o_jax.errors import UserError

TFDS = "tfds:"
_TFDS_FILE = "dataset_info.json"


class Source(Protocol):
  """Random access to records; the protocol of `grain.sources.RandomAccessDataSource`."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict: ...


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One source of samples.

  path: one path, pattern or list of these (see data.files.expand), local or in a bucket, all of one kind:
    tars `*.tar` (WebDataset); rows `*.jsonl`; ArrayRecord `*.array_record*`; a folder of any of these; a prepared TFDS
    dataset (its folder, or `tfds:NAME` for one under TFDS_DATA_DIR); a folder of cached features (data.features).
    Of these last two, only one.
  weight: share in a mixture; 0 = the number of its samples, so that sources are as good as concatenated (spec 11.2).
  image, text: which fields of a row or features of a TFDS dataset are the picture and its caption; "" = image, and
    text or caption, whichever there is.
  root: folder of the pictures of a .jsonl; "" = the folder of the file.
  split: of a TFDS dataset.
  """

  path: str | tuple[str, ...] = ""
  weight: float = 0.0
  image: str = ""
  text: str = ""
  root: str = ""
  split: str = "train"

  def __post_init__(self):
    if not isinstance(self.path, str | list | tuple) or not all(isinstance(x, str | os.PathLike) for x in self.path):
      raise UserError(f"data path {self.path!r} is none; give a path, or a list of these")

  @property
  def paths(self) -> list[str]:
    """`path` as a list, whether it is one or several."""
    return [self.path] if isinstance(self.path, str) else [os.fspath(path) for path in self.path]


def open_source(cfg: SourceConfig | str | os.PathLike, *, captions: bool = True) -> Source:
  """The source that a config or a plain path means.

  Args:
    captions: refuse tars of pictures alone.

  Raises:
    UserError: nothing there, files of several kinds, or what is wrong with them.
  """
  cfg = cfg if isinstance(cfg, SourceConfig) else SourceConfig(os.fspath(cfg))
  named = [path for path in cfg.paths if path.startswith(TFDS)]
  found = named + files.expand([path for path in cfg.paths if path not in named])
  if alone := [path for path in found if _is_features(path) or _is_tfds(path)]:
    if len(found) > 1:
      raise UserError(f"{alone[0]} cannot be read as one with others; name each of them under data.sources")
    return FeatureSource(found[0]) if _is_features(found[0]) else TfdsSource(dataclasses.replace(cfg, path=found[0]))
  shards = [file for path in found for file in _data_files(path)]
  kinds = {_kind(shard) for shard in shards}
  if len(kinds) > 1:
    where = ", ".join(cfg.paths)
    raise UserError(f"{where} holds data of several kinds ({', '.join(sorted(kinds))}); name the files of one")
  if kinds == {"tar"}:
    return TarSource(shards, captions)
  return (JsonlSource if kinds == {"jsonl"} else ArrayRecordSource)(shards, cfg)


def _kind(path: str) -> str | None:
  name = path.rpartition("/")[2]
  for kind, mark in (("tar", ".tar"), ("jsonl", ".jsonl")):
    if name.endswith(mark):
      return kind
  return "array_record" if ".array_record" in name else None  # sharded names go on: .array_record-00000-of-00010


def _data_files(path: str) -> list[str]:
  if _kind(path):
    return [path]
  if files.is_folder(path):
    if inside := [f"{path.rstrip('/')}/{name}" for name in files.listing(path) if _kind(name)]:
      return inside
    raise UserError(f"no data at {path}: the folder holds neither .tar shards nor .jsonl, .array_record or TFDS files")
  raise UserError(f"{path} is no data that is known here; give .tar shards, .jsonl or .array_record files, or a folder")


def _is_features(path: str) -> bool:
  return not _kind(path) and os.path.exists(os.path.join(path, MANIFEST))


def _is_tfds(path: str) -> bool:
  if path.startswith(TFDS):
    return True
  return not _kind(path) and files.is_folder(path) and _TFDS_FILE in files.listing(path)


def _record(row: dict, cfg: SourceConfig, name: str) -> dict:
  """A row with picture and caption where builders look for them. Raises UserError if a named field is missing."""
  if lacking := [field for field in (cfg.image, cfg.text) if field and field not in row]:
    raise UserError(f"{name} has no field {lacking[0]!r}; there are {', '.join(sorted(map(str, row)))}")
  text = row.get(cfg.text) if cfg.text else row.get("text", row.get("caption"))
  if isinstance(text, bytes):
    try:
      text = text.decode()
    except UnicodeDecodeError:
      raise UserError(f"the caption of {name} is not UTF-8") from None
  return row | {"image": row.get(cfg.image or "image"), "name": name} | ({} if text is None else {"text": text})


def _with_bytes(record: dict) -> dict:
  """The record itself. Raises UserError if its picture is no bytes."""
  if not isinstance(record["image"], bytes | None):
    raise UserError(f"{record['name']}: its picture is a {type(record['image']).__name__}, not the bytes of a file")
  return record


class JsonlSource:
  """Rows of JSON-lines files with picture files beside them: {"image": path or null, "text": caption, ...}.

  Args:
    paths: the files.
    cfg: fields, and folder of the pictures.

  Raises:
    UserError: a file that cannot be read, or no rows.
  """

  def __init__(self, paths: list[str], cfg: SourceConfig = SourceConfig()):
    self.paths, self._cfg = paths, cfg
    self._starts = [files.scan(path, _line_starts) for path in paths]  # 8 bytes a row
    self._first = np.cumsum([0] + [len(starts) - 1 for starts in self._starts]).tolist()
    if not len(self):
      raise UserError(f"{paths[0]} has no rows")

  def __len__(self) -> int:
    return self._first[-1]

  def __repr__(self) -> str:
    return f"JsonlSource({_few(self.paths)}, {len(self)} rows)"

  def __getitem__(self, index: int) -> dict:
    """The row with its picture as bytes. Raises UserError for a bad row or a missing picture."""
    number = bisect.bisect_right(self._first, index) - 1
    line = index - self._first[number]
    start, end = self._starts[number][line : line + 2].tolist()
    path = self.paths[number]
    name = f"{path}: line {line + 1}"
    try:
      row = json.loads(files.read(path, start, end - start))
    except (ValueError, RecursionError) as error:
      raise UserError(f"{name} is not JSON: {error}") from None
    if not isinstance(row, dict):
      raise UserError(f"{name} is not a JSON object")
    record = _record(row, self._cfg, name)
    if record["image"] is not None:
      if not isinstance(record["image"], str):
        raise UserError(f"{name}: its picture is {record['image']!r}, not a path")
      root = self._cfg.root or os.path.dirname(path)
      try:
        record["image"] = files.read(os.path.join(root, record["image"]))
      except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return record


def _line_starts(lines: BinaryIO) -> np.ndarray:
  """Where each line begins and the last ends, int64 [n + 1]; empty lines at the end are none."""
  sizes = [0]
  rows = 0
  for line in lines:
    sizes.append(len(line))
    rows = len(sizes) - 1 if line.strip() else rows
  return np.cumsum(sizes[: rows + 1], dtype=np.int64)


def _few(paths: list[str]) -> str:
  return ", ".join(paths[:3]) + ", ..." * (len(paths) > 3)


class ArrayRecordSource:
  """Records of ArrayRecord files: each a msgpack map, the fields of a JSONL row with the picture itself in "image".

  {"image": bytes of a JPEG, PNG or WebP file, "text": caption} for captions; {"image": ..., "conversations": [...]} for
  questions. Write them with `group_size:1`, or every read fetches a whole group.

  Raises:
    UserError: a file that is not ArrayRecord, or no records.
  """

  def __init__(self, paths: list[str], cfg: SourceConfig = SourceConfig()):
    if remote := [path for path in paths if files.is_remote(path)]:
      raise UserError(f"{remote[0]}: ArrayRecord is read from local disks only; copy it, or mount the bucket")
    self.paths, self._cfg = paths, cfg
    files.keep_open(len(paths))
    self._files = [_array_record(path) for path in paths]
    self._first = np.cumsum([0] + [len(file) for file in self._files]).tolist()
    if not len(self):
      raise UserError(f"{paths[0]} has no records")

  def __len__(self) -> int:
    return self._first[-1]

  def __repr__(self) -> str:
    return f"ArrayRecordSource({_few(self.paths)}, {len(self)} records)"

  def __getitem__(self, index: int) -> dict:
    """The record's fields. Raises UserError for one that cannot be read or is no msgpack map."""
    number = bisect.bisect_right(self._first, index) - 1
    place = index - self._first[number]
    name = f"{self.paths[number]}: record {place}"
    with files.reading(name):
      content = self._files[number][place]
    try:
      row = msgpack.unpackb(content)
    except Exception as error:  # the library raises several kinds that share no parent
      raise UserError(f"{name} is not msgpack: {error}") from None
    if not isinstance(row, dict):
      raise UserError(f"{name} is not a msgpack map")
    return _with_bytes(_record(row, self._cfg, name))


def _array_record(path: str) -> Records:
  with files.reading(path):
    return open_records(path)


class TfdsSource:
  """Examples of a TFDS dataset that is prepared as ArrayRecord (`tfds build --file_format=array_record`).

  Raises:
    UserError: no such dataset, split or feature; another file format.
  """

  def __init__(self, cfg: SourceConfig):
    import tensorflow_datasets as tfds  # slow to import, and seldom needed

    self.path, self._cfg = str(cfg.path), cfg
    image, text = cfg.image or "image", cfg.text
    try:
      if self.path.startswith(TFDS):
        builder = tfds.builder(self.path.removeprefix(TFDS))
      else:
        builder = tfds.builder_from_directory(self.path)
      features = builder.info.features
      if lacking := [name for name in (image, text) if name and name not in features]:
        raise UserError(f"{self.path} has no feature {lacking[0]!r}; there are {', '.join(features)}")
      # The pictures stay encoded: they are decoded as all others are.
      decoders = {image: tfds.decode.SkipDecoding()}
      self._examples = builder.as_data_source(split=cfg.split, decoders=decoders)
      files.keep_open(len(builder.info.splits[cfg.split].file_instructions))
      self._examples.data_source = Records(self._examples.data_source)
      length = len(self._examples)
    except UserError:
      raise
    except Exception as error:  # the library raises whatever comes
      raise UserError(f"{self.path}, split {cfg.split!r}: {' '.join(str(error).split())[:300]}") from None
    if not length:
      raise UserError(f"{self.path}, split {cfg.split!r}, has no examples")

  def __len__(self) -> int:
    return len(self._examples)

  def __repr__(self) -> str:
    return f"TfdsSource({self.path}, split {self._cfg.split}, {len(self)} examples)"

  def __getitem__(self, index: int) -> dict:
    """The example's features, its picture as bytes. Raises UserError for one that cannot be read, or has no bytes."""
    name = f"{self.path}: {self._cfg.split} {index}"
    with files.reading(name):
      example = dict(self._examples[index])
    return _with_bytes(_record(example, self._cfg, name))
