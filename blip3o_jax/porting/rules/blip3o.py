"""Which keys of a whole BLIP3-o checkpoint belong to which component, and under which name its table knows them."""

from collections.abc import Iterable, Mapping
from typing import Any

from blip3o_jax.porting.safetensors_io import Renamed

# (prefix in the checkpoint, component, prefix in the component's own table); the first match counts (spec 10.1, 10.5).
PREFIXES = (
  ("model.latent_queries", "queries", "latent_queries"),
  ("model.dit.", "dit", ""),
  ("model.down_projector.", "projection", ""),
  ("model.gen_vision_tower.vision_tower.model.", "clip", ""),
  ("unet.", "unet", ""),
  ("vae.", "vae", ""),
  ("", "backbone", ""),
)

# The SigLIP2 + Sana autoencoder, as released and as its training branch names it (spec 7.3); Sana's table has both.
AUTOENCODER = (
  ("encoder.model.", "clip", ""),
  ("encoder.", "clip", ""),
  ("transformer.", "unet", "transformer."),
  ("connector.", "unet", "connector."),
  ("vae.", "vae", ""),
)


def is_autoencoder(keys: Iterable[str]) -> bool:
  """Whether a checkpoint is the SigLIP2 + Sana autoencoder: Sana's key for its time, under either name."""
  return any(key.endswith("time_embed.linear.weight") and key.startswith("transformer.") for key in keys)


def split(keys: Iterable[str]) -> dict[str, dict[str, str]]:
  """{component: {key in its table: key in the checkpoint}}; whatever has no prefix of another is the backbone's."""
  parts: dict[str, dict[str, str]] = {}
  keys = list(keys)
  prefixes = (*AUTOENCODER, PREFIXES[-1]) if is_autoencoder(keys) else PREFIXES
  for key in keys:
    prefix, component, own = next(entry for entry in prefixes if key.startswith(entry[0]))
    parts.setdefault(component, {})[own + key.removeprefix(prefix)] = key
  return parts


def part(reader: Mapping[str, Any], component: str) -> Renamed:
  """The keys of one component of a checkpoint, as its table names them; empty if the checkpoint has none."""
  return Renamed(reader, split(reader).get(component, {}))


def full_key(component: str, key: str) -> str:
  """The inverse: a key of a component's table as the whole checkpoint names it."""
  prefix, _, own = next(entry for entry in PREFIXES if entry[1] == component)
  return prefix + key.removeprefix(own)
