"""Several models as one: how a run that trains one part gets all others (floor 3)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from blip3o_jax.data.tokenizer import require_same
from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.models.qwen3_siglip import Qwen3SiglipConfig
from blip3o_jax.models.siglip import SiglipConfig
from blip3o_jax.models.text_decoder import TextDecoderConfig
from blip3o_jax.porting import model_dir
from blip3o_jax.porting.safetensors_io import Renamed, Stored, spec, stream
from blip3o_jax.porting.source import Source

_EYES = "blip3o-qwen3-siglip2"
# Fields of the config that belong to a component, where it is not just the one of its name.
_FIELDS = {"unet": ("unet", "decoder_process", "image_size"), "projection": ("design",)}


def join(first: Source, other: Source) -> Source:
  """`first` with the parts that only `other` has, and their sizes.

  SigLIP beside Qwen3 alone becomes its understanding tower (spec 8), behind a fresh projector.

  Raises:
    UserError: they read text through different tokenizers, or no preset has parts of such kinds together.
  """
  if first.tokenizer and other.tokenizer:
    require_same(first.tokenizer_dir(), other.tokenizer_dir())
  if _can_see_through(other.config(), other) and _has_no_eyes(first.config(), first):
    return _with_eyes(first, other)
  new = {name: found for name, found in other.weights.items() if name not in first.weights}
  # The sizes start from those of the source that has more, whose preset can say all of them.
  whole, part, names = (
    (first, other, new) if len(first.weights) >= len(other.weights) else (other, first, first.weights)
  )
  changes = {field: getattr(part.config(), field) for name in names for field in _FIELDS.get(name, (name,))}
  if part is first:  # a UNet that lies without its scheduler knows nothing of the process
    known = presets.get(part.preset)
    changes = {field: x for field, x in changes.items() if field in names or x != getattr(known, field)}
  name = f"{first.name} and {other.name}"
  return dataclasses.replace(
    first,
    name=name,
    preset=whole.preset,
    overrides=_overrides(name, whole.preset, dataclasses.replace(whole.config(), **changes)),
    weights=first.weights | new,
    entries=first.entries | {name: entry for name, entry in other.entries.items() if name in new},
    tokenizer=first.tokenizer or other.tokenizer,
    preprocessor=first.preprocessor or other.preprocessor,
    sampling=first.sampling or other.sampling,
    provenance=first.provenance + other.provenance,
  )


def _overrides(name: str, preset: str, config: Blip3oConfig) -> dict[str, Any]:
  base = presets.get(preset)
  kind = lambda model, name: type(getattr(model, name))
  other = [part for part in ("backbone", "clip", "unet", "vae") if kind(base, part) is not kind(config, part)]
  if other:
    kinds = ", ".join(f"{kind(config, part).__name__} as {part}" for part in other)
    raise UserError(f"{name} do not go together: preset {preset!r} cannot have {kinds}")
  return model_dir.plain(presets.difference(base, config))


def _can_see_through(config: Blip3oConfig, source: Source) -> bool:
  return source.components == ("clip",) and isinstance(config.clip, SiglipConfig)


def _has_no_eyes(config: Blip3oConfig, source: Source) -> bool:
  kind = config.backbone
  return "backbone" in source.weights and isinstance(kind, TextDecoderConfig) and kind.qk_norm


def _with_eyes(first: Source, tower: Source) -> Source:
  """The backbone of the Qwen3 branch, made of Qwen3 and SigLIP, and the other parts of `first`."""
  text, vision = first.config().backbone, dataclasses.replace(tower.config().clip, pool_stride=1)
  base = presets.get(_EYES)
  # The three added tokens are the last; `<image>`, which stands for a vector of a picture, is the very last.
  backbone = Qwen3SiglipConfig(text=text, vision=vision, image_token=text.vocab - 1)
  kept = {name: getattr(first.config(), name) for name in ("clip", "unet", "vae", "decoder_process", "image_size")}
  dit = dataclasses.replace(base.dit, condition_dim=text.dim, in_channels=kept["clip"].width)
  config = dataclasses.replace(base, backbone=backbone, dit=dit, **kept)
  seen = tower.weights["clip"]
  names = {f"model.vision_tower.vision_tower.{key}": key for key in seen}
  parts = [first.weights["backbone"], Renamed(seen, names), _projector(text.dim, vision.width)]
  name = f"{first.name} and {tower.name}"
  return dataclasses.replace(
    first,
    name=name,
    preset=_EYES,
    overrides=_overrides(name, _EYES, config),
    weights=first.weights | {"backbone": _Chained(parts)},
    entries={name: entry for name, entry in first.entries.items() if name != "backbone"},
    preprocessor=tower.preprocessor,
    provenance=first.provenance + tower.provenance,
  )


def _projector(dim: int, width: int) -> dict[str, np.ndarray]:
  """Fresh numbers as torch draws them, uniform within 1 / sqrt(fan in); the same every time."""
  rng = np.random.default_rng(0)
  draw = lambda fan_in, *shape: (rng.uniform(-1, 1, shape) / np.sqrt(fan_in)).astype(np.float32)
  return {
    "model.mm_projector.0.weight": draw(width, dim, width),
    "model.mm_projector.0.bias": draw(width, dim),
    "model.mm_projector.2.weight": draw(dim, dim, dim),
    "model.mm_projector.2.bias": draw(dim, dim),
  }


class _Chained(Mapping[str, np.ndarray]):
  """The keys of several readers."""

  def __init__(self, readers: list[Mapping[str, Any]]):
    self._of = {key: reader for reader in readers for key in reader}

  def __getitem__(self, key: str) -> np.ndarray:
    return self._of[key][key]

  def __iter__(self) -> Iterator[str]:
    return iter(self._of)

  def __len__(self) -> int:
    return len(self._of)

  def stream(self, key: str) -> Stored:
    return stream(self._of[key], key)

  def shape(self, key: str) -> tuple[int, ...]:
    return spec(self._of[key], key).shape

  def dtype(self, key: str) -> np.dtype:
    return spec(self._of[key], key).dtype
