"""One table of rules a component: reference keys <-> our parameters."""

import importlib
from collections.abc import Sequence

from blip3o_jax.errors import UserError
from blip3o_jax.porting.convert import Rule

# Component (or model outside the BLIP3-o family) -> module of this package whose RULES are its table.
_MODULES = {
  "backbone": "qwen2_5_vl",
  "queries": "queries",
  "dit": "next_dit",
  "clip": "eva_clip",
  "text_tower": "text_tower",
  "unet": "unet",
  "vae": "autoencoder_kl",
  "text_decoder": "text_decoder",
  "siglip": "siglip",
  "sana": "sana",
  "dc_ae": "autoencoder_dc",
}


def get(component: str) -> Sequence[Rule]:
  """The table of `component`.

  Raises:
    UserError: no such component.
  """
  if component not in _MODULES:
    raise UserError(f"component {component!r} is unknown; choose one of {', '.join(_MODULES)}")
  return importlib.import_module(f"{__name__}.{_MODULES[component]}").RULES
