"""One table of rules a component: reference keys <-> our parameters."""

import importlib
from collections.abc import Sequence

from blip3o_jax.errors import UserError
from blip3o_jax.models.autoencoder_dc import AutoencoderDCConfig
from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.models.qwen2_5_vl import Qwen25VLConfig
from blip3o_jax.models.qwen3_siglip import Qwen3SiglipConfig
from blip3o_jax.models.sana import SanaConfig
from blip3o_jax.models.siglip import SiglipConfig
from blip3o_jax.models.text_decoder import TextDecoderConfig
from blip3o_jax.porting.convert import Rule

# Component (or model that is none, or not always) -> module of this package whose RULES are its table.
_MODULES = {
  "queries": "queries",
  "projection": "projection",
  "dit": "next_dit",
  "clip": "eva_clip",
  "text_tower": "text_tower",
  "unet": "unet",
  "vae": "autoencoder_kl",
  "qwen2_5_vl": "qwen2_5_vl",
  "qwen3_siglip": "qwen3_siglip",
  "text_decoder": "text_decoder",
  "siglip": "siglip",
  "sana": "sana",
  "dc_ae": "autoencoder_dc",
}

# A component may be one of several models; those that stand above are what it mostly is.
_KINDS = {
  Qwen25VLConfig: "qwen2_5_vl",
  Qwen3SiglipConfig: "qwen3_siglip",
  TextDecoderConfig: "text_decoder",
  SiglipConfig: "siglip",
  SanaConfig: "sana",
  AutoencoderDCConfig: "dc_ae",
}


def get(component: str, model: Blip3oConfig | None = None) -> Sequence[Rule]:
  """The table of `component`; it may depend on `model`, the whole it is part of (that of "backbone" always does).

  Raises:
    UserError: no such component.
  """
  component = _KINDS.get(type(getattr(model, component, None)), component)
  if component not in _MODULES:
    raise UserError(f"component {component!r} is unknown; choose one of {', '.join(_MODULES)}")
  return importlib.import_module(f"{__name__}.{_MODULES[component]}").RULES
