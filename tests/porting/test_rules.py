"""The tables of all components against the published models: number of tensors, number of parameters, some shapes."""

import math

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.blip3o import COMPONENTS
from blip3o_jax.porting import convert, rules, source
from blip3o_jax.porting.rules import blip3o

# (tensors, parameters) of each component (spec 2.1, 10.2 to 10.5).
SIZES = {
  "blip3o-8b": {
    "backbone": (729, 8_289_328_128),
    "queries": (1, 229_376),
    "dit": (642, 1_365_010_336),
    "clip": (772, 4_350_208_256),
    "unet": (1680, 2_525_520_644),
    "vae": (248, 83_653_863),
  },
  "blip3o-4b": {"backbone": (824, 3_754_074_112), "queries": (1, 131_072), "dit": (642, 1_362_257_824)},
  # 9 tensors a layer of Llama and 11 of Qwen3, the input table, a norm; 16 a layer of SigLIP and 5; the projector.
  "blip3o-study": {"backbone": (9 * 16 + 2, 1_235_814_400 + 3 * 2048)},
  "blip3o-siglip2-sana": {"clip": (16 * 27 + 5, 413_534_448), "projection": (1, 2048 * 1152)},
  "blip3o-qwen3-siglip2": {"backbone": (11 * 28 + 2 + 16 * 27 + 5 + 4, 1_720_034_304 + 413_534_448 + 6_557_696)},
}


def specs(preset, component):
  model = presets.get(preset)
  abstract = source.abstract_params(model, (component,))[component]
  return convert.reference_specs(rules.get(component, model), abstract)


@pytest.mark.parametrize(("preset", "component"), [(p, c) for p, sizes in SIZES.items() for c in sizes])
def test_published_sizes(preset, component):
  found = specs(preset, component)
  assert (len(found), sum(math.prod(s.shape) for s in found.values())) == SIZES[preset][component]


def test_published_names():
  names = {
    "backbone": ("lm_head.weight", (151668, 3584)),
    "queries": ("model.latent_queries", (1, 64, 3584)),
    "dit": ("model.dit.model.layers.23.feed_forward.linear_1.weight", (4864, 1792)),
    "clip": ("model.gen_vision_tower.vision_tower.model.blocks.63.mlp.fc1.weight", (15360, 1792)),
    "projection": ("model.down_projector.weight", (1792, 3584)),
    "unet": ("unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight", (1280, 1792)),
    "vae": ("vae.decoder.mid_block.attentions.0.to_q.weight", (512, 512)),
  }
  for component, (name, shape) in names.items():
    full = {blip3o.full_key(component, key): spec.shape for key, spec in specs("blip3o-8b", component).items()}
    assert full[name] == shape
    # Every full name leads back to its component and its own key.
    assert {c: set(keys.values()) for c, keys in blip3o.split(full).items()} == {component: set(full)}
    assert all(blip3o.full_key(component, own) == key for own, key in blip3o.split(full)[component].items())


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_miniature_has_a_rule_for_every_parameter(component):
  assert specs("micro", component)


def test_unknown_component():
  with pytest.raises(UserError, match="unknown"):
    rules.get("heart", presets.get("micro"))
