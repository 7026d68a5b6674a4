"""The layout of the PyTorch release, whole or in part, in and out (spec part 10; floor 3).

config.json, model*.safetensors          backbone, queries, DiT, perhaps the CLIP tower, told apart by prefix
diffusion-decoder/                       a diffusers pipeline: model_index.json, unet/, vae/, scheduler/, ...
tokenizer.json, ..., preprocessor_config.json

All that the release's own code reads is written, but for its pipeline_llava_gen.py, which belongs into
diffusion-decoder/; it asks for decoder files in bfloat16.

Read as well: Qwen2.5-VL-Instruct alone, made ready for the queries; the other backbones (spec part 8), told by their
keys; EVA-CLIP's file alone, or SigLIP's; the SigLIP2 + Sana autoencoder (spec 7.3); one part that `write` wrote.
What the release cannot say (the paper's rotary axes, the miniature's position codes) stands in config.json under OURS.
"""

import dataclasses
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from blip3o_jax.data.tokenizer import IMAGE_TOKENS, load_tokenizer
from blip3o_jax.diffusion.euler_discrete import EulerDiscreteConfig
from blip3o_jax.errors import Problems, UserError
from blip3o_jax.models import presets
from blip3o_jax.models.autoencoder_kl import AutoencoderKLConfig
from blip3o_jax.models.blip3o import BackboneConfig, Blip3oConfig
from blip3o_jax.models.eva_clip import EvaClipConfig
from blip3o_jax.models.next_dit import NextDiTConfig
from blip3o_jax.models.qwen2_5_vl import Qwen25VLConfig
from blip3o_jax.models.qwen3_siglip import Qwen3SiglipConfig
from blip3o_jax.models.siglip import SiglipConfig
from blip3o_jax.models.text_decoder import TextDecoderConfig
from blip3o_jax.models.unet import UNetConfig
from blip3o_jax.porting import model_dir, safetensors_io
from blip3o_jax.porting.rules import blip3o
from blip3o_jax.porting.safetensors_io import Renamed, Spec, spec
from blip3o_jax.porting.source import TOKENIZER_FILES, Source

OURS = "blip3o_jax"
DECODER = "diffusion-decoder"
PARTS = ("backbone", "queries", "dit", "projection", "clip", "unet", "vae")
_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_DIFFUSERS, _INDEX = "diffusion_pytorch_model", "model_index.json"
QWEN_TOKENS = 151665  # of Qwen2.5-VL's own tokenizer (spec 4.1)
_PUBLISHED = ("blip3o-8b", "blip3o-4b", "blip3o-qwen3-siglip2", "blip3o-study")
_SIGLIP = "embeddings.patch_embedding.weight"  # after "vision_model.", which transformers 5 leaves out
_AUTOENCODER = "blip3o-siglip2-sana"  # one size is released, and its config tells none
_SANA_SAMPLING = {"decoder_steps": 30, "decoder_solver": "dpm++", "decoder_null": "image"}  # spec 7.3
_SHARD = 5_000_000_000  # bytes, as transformers writes them
# What `write` leaves beside _CONFIG.
_OWN = (_PREPROCESSOR, *TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json") + tuple(
  f"{DECODER}/{file}" for file in (_INDEX, "*/*.safetensors", "*/*config.json")
)


# ---- reading ----


def open_release(path: os.PathLike | str, name: str = "") -> Source:
  """The model in a directory (or single .safetensors file) of the release's layout; reads no array.

  Raises:
    UserError: no such model there, or what is wrong with its files: all of it in one message.
  """
  path, name = epath.Path(path), name or os.fspath(path)
  if (path / model_dir.INCOMPLETE).exists():
    raise UserError(f"{name}: was not written to its end; write it again")
  home = path.parent if path.is_file() else path
  config, weights, problems = _json(home / _CONFIG), {}, []

  def opened(where: epath.Path) -> Mapping[str, Any]:
    try:
      return safetensors_io.open_weights(where)
    except Problems as error:
      problems.extend(error.problems)
    except UserError as error:
      problems.append(str(error))
    return {}

  if path.is_file():
    weights = _transformer_parts(opened(path))
  elif config.get("_class_name") in ("UNet2DConditionModel", "AutoencoderKL"):  # one part of the decoder alone
    part = "unet" if config["_class_name"].startswith("UNet") else "vae"
    weights = {part: opened(_diffusers_file(path))}
  else:
    if any(f.name.endswith((".safetensors", *safetensors_io.PICKLES)) for f in path.iterdir()):
      weights = _transformer_parts(opened(path))
    decoder = path / DECODER if (path / DECODER).is_dir() else path
    weights |= {part: opened(_diffusers_file(decoder / part)) for part in ("unet", "vae") if (decoder / part).is_dir()}
  safetensors_io.tell(problems, name)
  weights = {part: weights[part] for part in PARTS if part in weights}
  if not weights:
    raise UserError(f"{name}: not a model: neither {model_dir.MANIFEST} nor weights of the release's layout")

  tokenizer = home if any((home / file).exists() for file in ("tokenizer.json", "vocab.json")) else None
  if set(weights) & {"backbone", "queries", "dit"} == {"backbone"} and OURS not in config:
    weights["backbone"] = _ready_for_queries(weights["backbone"], tokenizer, name)
  ours = config.get(OURS) or {}
  if ours:
    preset, overrides = ours["preset"], ours["overrides"]
  else:
    try:
      preset, overrides = _describe_siglip(config, weights) or _describe(_model_config(home, config, weights))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
      raise UserError(f"{home / _CONFIG}: cannot be understood ({type(error).__name__}: {error})") from error
  return Source(
    name=name,
    path=home,
    preset=preset,
    overrides=overrides,
    weights=weights,
    tokenizer=tokenizer,
    preprocessor=_json(home / _PREPROCESSOR) or None,
    sampling=ours.get("sampling", {}) or (_SANA_SAMPLING if preset == _AUTOENCODER and "unet" in weights else {}),
    provenance=ours.get("provenance", [{"source": name}]),
  )


def _transformer_parts(reader: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """The parts of a checkpoint; EVA-CLIP's own file has no prefix, and SigLIP's may have a text tower beside."""
  if {"cls_token", "pos_embed"} <= set(reader):
    return {"clip": reader}
  for prefix in ("vision_model.", ""):
    if prefix + _SIGLIP in reader:
      names = {f"vision_model.{key.removeprefix(prefix)}": key for key in reader if key.startswith(prefix)}
      return {"clip": Renamed(reader, names)}
  return {part: Renamed(reader, names) for part, names in blip3o.split(reader).items()}


def _diffusers_file(folder: epath.Path) -> epath.Path:
  """The weights in a folder that diffusers saved: the plain ones, or those of the release's variant."""
  for variant in ("", ".bf16", ".fp16"):
    for file in (f"{_DIFFUSERS}.safetensors.index{variant}.json", f"{_DIFFUSERS}{variant}.safetensors"):
      if (folder / file).exists():
        return folder / file
  return folder


def _json(path: epath.Path) -> dict[str, Any]:
  """A JSON object, {} if there is no such file."""
  if not path.exists():
    return {}
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"{path}: not JSON ({error}); download it again") from error
  if not isinstance(content, dict):
    raise UserError(f"{path}: expected a JSON object; download it again")
  return content


def _model_config(home: epath.Path, config: Mapping[str, Any], weights: Mapping[str, Mapping]) -> Blip3oConfig:
  """The architecture, from the config files and the shapes of the tensors; what is not there is the preset's."""
  shapes = {part: {key: spec(reader, key).shape for key in reader} for part, reader in weights.items()}
  kind = _backbone_kind(config, shapes["backbone"]) if "backbone" in shapes else Qwen25VLConfig
  dim = config.get("hidden_size") or config.get("text_config", {}).get("hidden_size")
  model = presets.get(_closest(kind, dim))
  parts: dict[str, Any] = {}
  if "backbone" in shapes:
    parts["backbone"] = kind.from_reference(config, shapes["backbone"])
    parts["dit"] = dataclasses.replace(model.dit, condition_dim=parts["backbone"].dim)
  if "queries" in shapes:
    parts["queries"] = shapes["queries"]["latent_queries"][1]
  if "projection" in shapes:
    parts["design"] = "clip_mse"
  if "dit" in shapes:
    parts["dit"] = NextDiTConfig.from_shapes(shapes["dit"])
  if "clip" in shapes:
    parts["clip"] = EvaClipConfig.from_shapes(shapes["clip"], config)
    if "dit" in parts:
      side = parts["clip"].side // parts["clip"].pool_stride
      parts["dit"] = dataclasses.replace(parts["dit"], grid=(side, side))
  decoder = home / DECODER if (home / DECODER).is_dir() else home
  for part, build in (("unet", UNetConfig.from_reference), ("vae", AutoencoderKLConfig.from_reference)):
    if part in shapes:
      alone = config.get("_class_name")
      parts[part] = build(config if alone else _json(decoder / part / _CONFIG))
  if scheduler := _json(decoder / "scheduler" / "scheduler_config.json"):
    parts["decoder_process"] = EulerDiscreteConfig.from_reference(scheduler)
  if "unet" in shapes and "vae" in shapes:
    sample_size = _json(decoder / "unet" / _CONFIG).get("sample_size") or 128
    parts["image_size"] = sample_size * parts["vae"].downsampling
  return dataclasses.replace(model, **parts)


def _backbone_kind(config: Mapping[str, Any], keys: Collection[str]) -> type[BackboneConfig]:
  """Which of the backbones a checkpoint holds. Its tower tells; the release's model_type is a name of its own."""
  if any(key.startswith("model.vision_tower.") for key in keys):
    return Qwen3SiglipConfig
  sees = "vision_config" in config or any("visual." in key for key in keys)
  return Qwen25VLConfig if sees else TextDecoderConfig


def _closest(kind: type[BackboneConfig], dim: int | None) -> str:
  """The published preset with a backbone of this kind, and of this width if there is one."""
  names = [name for name in _PUBLISHED if type(presets.get(name).backbone) is kind]
  return next((name for name in names if presets.get(name).backbone.dim == dim), names[0])


def _describe(config: Blip3oConfig) -> tuple[str, dict[str, Any]]:
  """The published preset closest by its backbone, and where the config differs from it."""
  preset = _closest(type(config.backbone), config.backbone.dim)
  return preset, model_dir.plain(presets.difference(presets.get(preset), config))


def _describe_siglip(config: Mapping[str, Any], weights: Mapping[str, Mapping]) -> tuple[str, dict[str, Any]] | None:
  """The same of the SigLIP2 + Sana autoencoder, or of SigLIP alone; None if it is neither."""
  if "unet" in weights and blip3o.is_autoencoder(weights["unet"]):
    return _AUTOENCODER, {}
  tower = weights.get("clip", {})
  if f"vision_model.{_SIGLIP}" not in tower:
    return None
  base = presets.get(_AUTOENCODER)
  clip = SiglipConfig.from_reference(config, {key: spec(tower, key).shape for key in tower})
  clip = dataclasses.replace(clip, head=False, pool_stride=base.clip.pool_stride)
  return _AUTOENCODER, model_dir.plain(presets.difference(base, dataclasses.replace(base, clip=clip)))


class _ReadyForQueries(Mapping[str, np.ndarray]):
  """Qwen2.5-VL with the three tokens of the release (spec 4.1): the tables cut (or grown) to hold just them; their rows
  of the input table are the mean of all rows before."""

  _TABLES = ("embed_tokens.weight", "lm_head.weight")

  def __init__(self, reader: Mapping[str, Any], base: int):
    self._reader, self._base = reader, base

  def __getitem__(self, key: str) -> np.ndarray:
    x = self._reader[key]
    if not key.endswith(self._TABLES):
      return x
    rows = self._base + len(IMAGE_TOKENS)
    out = np.zeros((rows, *x.shape[1:]), x.dtype)
    out[: min(rows, len(x))] = x[:rows]
    if key.endswith(self._TABLES[0]):
      out[self._base :] = np.mean(x[: self._base], axis=0, dtype=np.float32).astype(x.dtype)
    return out

  def __iter__(self) -> Iterator[str]:
    return iter(self._reader)

  def __contains__(self, key: object) -> bool:
    return key in self._reader

  def __len__(self) -> int:
    return len(self._reader)

  def shape(self, key: str) -> tuple[int, ...]:
    shape = spec(self._reader, key).shape
    return (self._base + len(IMAGE_TOKENS), *shape[1:]) if key.endswith(self._TABLES) else shape

  def dtype(self, key: str) -> np.dtype:
    return spec(self._reader, key).dtype


def _ready_for_queries(reader: Mapping[str, Any], tokenizer: epath.Path | None, name: str) -> Mapping[str, Any]:
  table = next((key for key in reader if key.endswith("embed_tokens.weight")), None)
  if table is None:
    return reader  # what is missing is told when it is checked
  rows, base = spec(reader, table).shape[0], QWEN_TOKENS
  if tokenizer is not None:
    alone = Source(name, tokenizer, "micro", {}, {}, tokenizer=tokenizer)
    base = load_tokenizer(alone.tokenizer_dir()).image_start
    if rows < base:
      raise UserError(f"{name}: {table} has {rows} rows, its tokenizer {base} tokens; they do not belong together")
  elif rows < base or not any("visual." in key for key in reader):
    return reader  # no published Qwen2.5-VL, and nothing that says how many of its rows are tokens
  return reader if rows == base + len(IMAGE_TOKENS) else _ReadyForQueries(reader, base)


# ---- writing ----


def write(
  source: Source, directory: os.PathLike | str, *, part: str | None = None, dtype: Any = None
) -> tuple[epath.Path, list[str]]:
  """Write a model in the release's layout; it appears complete or not at all. One array is on the host at a time.

  Args:
    part: this component alone, as its own library loads it.
    dtype: what floating-point parameters are stored as; their own if None.

  Returns:
    (the directory, components that the layout has no place for).

  Raises:
    UserError: unknown part, a component that does not fit, something else lies there, no space.
  """
  names = tuple(name for name in PARTS if name in source.components)
  if part is not None:
    if part not in names:
      raise UserError(f"{source.name}: no part {part!r} to write; choose one of {', '.join(names)}")
    names = (part,)
  config = source.config()
  kinds = {"clip": EvaClipConfig, "unet": UNetConfig, "vae": AutoencoderKLConfig}  # those that the layout has
  names = tuple(name for name in names if isinstance(getattr(config, name, None), kinds.get(name, object)))
  if not names:
    raise UserError(f"{source.name}: the layout of the release has no place for {part or 'any of its parts'}")
  left = [] if part else [name for name in source.components if name not in names]
  source.check(names)
  with model_dir.replacing(directory, _CONFIG, *_OWN) as out:
    top = [name for name in names if name not in ("unet", "vae")]
    if top:
      keyed = {name: (lambda key, name=name: blip3o.full_key(name, key)) for name in top}
      if part == "clip":
        keyed["clip"] = lambda key: key
      dtypes = _write_files(out, "model", [(keyed[name], *source.reference(name, dtype)) for name in top], _SHARD)
      _write_json(out / _CONFIG, _top_config(source, config, top, dtypes))
    decoder = out if part else out / DECODER
    for name, class_name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
      if name in names:
        side = config.image_size // config.vae.downsampling
        content = config.vae.to_reference() if name == "vae" else config.unet.to_reference(side)
        folder = decoder if part else decoder / name
        folder.mkdir(parents=True, exist_ok=True)
        specs, arrays = source.reference(name, dtype)
        # The release asks for this variant of the whole; a part alone is asked for by no name.
        half = not part and _floats(specs) == {"bfloat16"}
        _write_files(folder, f"{_DIFFUSERS}.bf16" if half else _DIFFUSERS, [(lambda key: key, specs, arrays)])
        _write_json(folder / _CONFIG, {"_class_name": class_name} | content)
    if "unet" in names and not part:
      _write_pipeline(decoder, config)
    if "backbone" in names:
      if source.tokenizer:
        _write_tokenizer(source.tokenizer_dir(), out)
      if preprocessor := source.image_preprocessor():
        _write_json(out / _PREPROCESSOR, {"image_processor_type": "Qwen2VLImageProcessor"} | preprocessor)
  return epath.Path(directory), left


def _top_config(source: Source, config: Blip3oConfig, names: list[str], dtypes: set[str]) -> dict[str, Any]:
  content: dict[str, Any] = {}
  if "backbone" in names:
    content |= config.backbone.to_reference()
  if "queries" in names:
    content |= {"n_query": config.queries, "n_und_query": 0, "latent_embedding_size": config.backbone.dim}
  if {"queries", "dit"} <= set(names):  # where no tower is named, the release builds neither and drops their weights
    content |= {"gen_vision_tower": "eva-clip-E-14-plus", "vision_tower_pretrained": ""}
    content |= {"gen_pooling": f"early_pool2d_{config.clip.pool_stride}"}
    content |= {"mm_use_im_start_end": False, "mm_use_im_patch_token": False}  # true would add tokens to the tokenizer
  if "clip" in names:
    content |= config.clip.to_reference()
  content["torch_dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
  ours = {"preset": source.preset, "overrides": source.overrides, "sampling": source.sampling}
  return content | {OURS: ours | {"provenance": source.provenance}}


def _write_pipeline(decoder: epath.Path, config: Blip3oConfig) -> None:
  """What makes UNet and VAE a pipeline of diffusers; language model and tokenizer are handed to it when it loads."""
  index = {
    "_class_name": ["pipeline_llava_gen", "EmuVisualGenerationPipeline"],
    "_diffusers_version": "0.32.2",  # of the release (spec 2.1)
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }
  process = {"_class_name": "EulerDiscreteScheduler"} | config.decoder_process.to_reference()
  for file, content in (
    (_INDEX, index),
    (f"scheduler/scheduler_{_CONFIG}", process),
    # Of the safety checker, which is off; the pipeline does not load without.
    (f"feature_extractor/{_PREPROCESSOR}", {"image_processor_type": "CLIPImageProcessor"}),
  ):
    (decoder / file).parent.mkdir(exist_ok=True)
    _write_json(decoder / file, content)


def _write_tokenizer(folder: os.PathLike | str, out: epath.Path) -> None:
  """Copy a tokenizer, with IMAGE_TOKENS where it lacks them, as Qwen's own does: the release cuts the tables of the
  backbone to what its tokenizer holds."""
  model_dir.take_tokenizer(folder, out)
  fast, config, slow = (_json(out / f"{file}.json") for file in ("tokenizer", "tokenizer_config", "added_tokens"))
  listed, named = fast.get("added_tokens", []), config.get("added_tokens_decoder", {})
  # Which of the files a reader goes by depends on its version and on use_fast.
  lacks = lambda held: [name for name in IMAGE_TOKENS if name not in held]
  to_listed = lacks([token["content"] for token in listed]) if fast else []
  to_named = lacks([token["content"] for token in named.values()]) if named else []
  to_slow = lacks(slow) if slow or not (fast or named) else []
  if not (to_listed or to_named or to_slow):
    return
  ids = load_tokenizer(folder).backend.token_to_id
  kind = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
  if fast:
    fast["added_tokens"] = listed + [{"id": ids(name), "content": name} | kind for name in to_listed]
    _write_json(out / "tokenizer.json", fast)
  if named:
    config["added_tokens_decoder"] = named | {str(ids(name)): {"content": name} | kind for name in to_named}
  if special := config.get("additional_special_tokens"):
    config["additional_special_tokens"] = special + lacks(special)
  if config:
    _write_json(out / "tokenizer_config.json", config)
  if to_slow:
    _write_json(out / "added_tokens.json", slow | {name: ids(name) for name in to_slow})


def _write_files(folder: epath.Path, stem: str, parts: list, limit: int | None = None) -> set[str]:
  """`parts`: (key in the table -> key in the file, specs, arrays). Several files and an index where they are large.

  Returns:
    The names of the dtypes written.
  """
  specs = {rename(key): spec for rename, found, _ in parts for key, spec in found.items()}
  arrays = ((rename(key), array) for rename, _, found in parts for key, array in found)
  shards: list[dict[str, Spec]] = [{}]
  filled = 0
  for key, one in specs.items():
    size = math.prod(one.shape) * one.dtype.itemsize
    if limit and filled + size > limit and shards[-1]:
      shards.append({})
      filled = 0
    shards[-1][key] = one
    filled += size
  one = len(shards) == 1
  names = [
    f"{stem}.safetensors" if one else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
  ]
  for file, shard in zip(names, shards, strict=True):
    with model_dir.local(folder / file) as path:
      some = ((key, array) for _, (key, array) in zip(range(len(shard)), arrays, strict=False))
      safetensors_io.write(path, shard, some, {"format": "pt"})
  if not one:
    total = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs.values())
    weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
    _write_json(
      folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
  return _floats(specs)


def _floats(specs: Mapping[str, Spec]) -> set[str]:
  """The names of the floating-point dtypes among `specs`."""
  return {spec.dtype.name for spec in specs.values() if jnp.issubdtype(spec.dtype, jnp.floating)}


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(model_dir.plain(content), indent=2) + "\n")
