"""The published sizes, and how an experiment changes them."""

import dataclasses
import json

import jax
import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.models.autoencoder_dc import DCLevel
from blip3o_jax.models.qwen2_5_vl import Qwen25VLConfig
from blip3o_jax.models.text_decoder import TextDecoder, TextDecoderConfig
from blip3o_jax.porting import source

# Spec 2.1, 2.7, 10.3 to 10.5.
SHARED = {"clip": 4_350_208_256, "unet": 2_525_520_644, "vae": 83_653_863}
COUNTS = {
  "blip3o-8b": {"backbone": 8_289_328_128, "queries": 229_376, "dit": 1_365_010_336, **SHARED},
  "blip3o-4b": {"backbone": 3_754_074_112, "queries": 131_072, "dit": 1_362_257_824},
  # Three tokens more than Llama-3.2-1B has, 264 rows fewer than Qwen3-1.7B's file; SigLIP2 without its head.
  "blip3o-study": {"backbone": 1_235_814_400 + 3 * 2048, "queries": 131_072},
  # Spec 7.1: SigLIP2 without its head, Sana with its connector, and its autoencoder.
  "blip3o-siglip2-sana": {"clip": 413_534_448, "unet": 1_604_462_752 + 7_969_536, "vae": 312_250_275},
  "blip3o-qwen3-siglip2": {"backbone": 1_720_574_976 - 264 * 2048 + 413_534_448 + 6_557_696, "dit": 1_362_257_824},
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
  shapes = source.abstract_params(presets.get(name), tuple(COUNTS[name]))
  assert {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in shapes.items()} == COUNTS[name]


def test_the_4b_model_differs_in_its_backbone_alone():
  big, small = presets.get("blip3o-8b"), presets.get("blip3o-4b")
  assert (big.clip, big.unet, big.vae, big.queries) == (small.clip, small.unet, small.vae, small.queries)
  assert (big.image_size, big.queries, big.text_tower) == (1024, 64, None)


@pytest.mark.parametrize("size", ["8b", "4b"])
def test_the_papers_form(size):
  """Grouped queries and three rotary axes (spec 2.6, 14); all else as released."""
  released, paper = presets.get(f"blip3o-{size}"), presets.get(f"blip3o-{size}-paper")
  assert (released.dit.kv_heads, released.dit.rope) == (28, "interleaved")
  assert (paper.dit.kv_heads, paper.dit.rope, paper.dit.rope_split) == (7, "concatenated", (16, 24, 24))
  same = {"kv_heads": 28, "rope": "interleaved", "rope_split": None}
  assert presets.get(f"blip3o-{size}-paper", {"dit": same}) == released


def test_the_parts_of_every_preset_fit_each_other():
  for name in presets.PRESETS:
    cfg = presets.get(name)
    side = cfg.clip.side // cfg.clip.pool_stride
    assert cfg.dit.grid == (side, side) and cfg.dit.in_channels == cfg.clip.width == cfg.unet.context_dim, name
    assert cfg.queries == side**2 and cfg.design == "clip_flow", name
    assert cfg.dit.condition_dim == cfg.backbone.dim, name
    assert cfg.unet.in_channels == cfg.vae.latent_channels and cfg.image_size % cfg.vae.downsampling == 0, name
    if cfg.text_tower:
      assert cfg.text_tower.text.vocab == cfg.backbone.text.vocab
      assert cfg.text_tower.patch_dim == 3 * (cfg.clip.patch_size * cfg.clip.pool_stride) ** 2
    if isinstance(cfg.backbone, Qwen25VLConfig):
      assert cfg.backbone.vision.out_dim == cfg.backbone.dim, name
    if not isinstance(cfg.backbone, TextDecoderConfig):
      assert cfg.backbone.image_token < cfg.backbone.text.vocab, name


@pytest.mark.parametrize(
  ("published", "vocab", "count"),
  [(presets.QWEN3_1_7B, 151936, 1_720_574_976), (presets.LLAMA_1B, 128256, 1_235_814_400)],
)
def test_language_models_with_the_vocabulary_of_their_public_checkpoints(published, vocab, count):
  init = lambda: TextDecoder(dataclasses.replace(published, vocab=vocab)).init(jax.random.key(0), method="touch")
  assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(init))) == count


def test_the_design_study_and_qwen3():
  """Spec 8 and 11.4: what differs from the models of the release, and that nothing else does."""
  study, qwen3 = presets.get("blip3o-study"), presets.get("blip3o-qwen3-siglip2")
  scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
  reference = study.backbone.to_reference()
  assert reference["rope_scaling"] == scaling | {"original_max_position_embeddings": 8192}
  assert (reference["model_type"], qwen3.backbone.to_reference()["model_type"]) == ("llama", "qwen3")
  for model, like in ((study, "blip3o-4b-paper"), (qwen3, "blip3o-4b")):  # as wide as Qwen2.5-VL-3B
    assert dataclasses.replace(presets.get(like), backbone=model.backbone) == model
  assert (qwen3.backbone.text.vocab, qwen3.backbone.image_token) == (151669 + 3, 151671)
  assert dataclasses.replace(qwen3.backbone.vision, head=True) == presets.SIGLIP2_SO400M


def test_siglip2_and_sana():
  """Spec 7 and 8: the same tower for what is seen and what is drawn; nothing else differs from the Qwen3 branch."""
  sana, qwen3 = presets.get("blip3o-siglip2-sana"), presets.get("blip3o-qwen3-siglip2")
  assert dataclasses.replace(sana.clip, pool_stride=1) == sana.backbone.vision and sana.dit.in_channels == 1152
  same = {name: getattr(qwen3, name) for name in ("clip", "unet", "vae", "decoder_process", "image_size")}
  same["dit"] = dataclasses.replace(sana.dit, in_channels=1792)
  assert dataclasses.replace(sana, **same) == qwen3


def test_overrides_go_as_deep_as_named_and_no_further():
  plain = presets.get("micro")
  cfg = presets.get("micro", {"dit": {"layers": 3}, "backbone": {"text": {"dim": 64}}, "queries": 9})
  assert (cfg.dit.layers, cfg.backbone.text.dim, cfg.queries) == (3, 64, 9)
  assert (cfg.dit.dim, cfg.backbone.text.layers, cfg.vae) == (plain.dit.dim, plain.backbone.text.layers, plain.vae)
  assert presets.get("micro") == plain
  assert presets.get("micro", {"text_tower": None}).text_tower is None


def test_levels_of_the_dc_ae_come_back_from_a_file():
  base = presets.get("blip3o-siglip2-sana")
  levels = (DCLevel(8, 1), DCLevel(16, 2, "EfficientViTBlock", (5,)))
  small = dataclasses.replace(base, vae=dataclasses.replace(base.vae, encoder=levels, decoder=levels))
  stored = json.loads(json.dumps(presets.difference(base, small)))
  assert presets.get("blip3o-siglip2-sana", stored) == small and hash(small)


def test_lists_become_tuples():
  cfg = presets.get("micro", {"vae": {"block_out_channels": [8, 16]}, "dit": {"grid": [4, 4]}})
  assert cfg.vae.block_out_channels == (8, 16) and cfg.dit.grid == (4, 4)
  hash(cfg)


@pytest.mark.parametrize(
  ("name", "overrides", "words"),
  [
    ("blip3o-9b", {}, "'blip3o-9b' is unknown; choose one of blip3o-8b"),
    ("micro", {"layers": 2}, "model.layers is not a field of Blip3oConfig"),
    ("micro", {"backbone": {"text": {"layer": 2}}}, "model.backbone.text.layer is not a field of TextDecoderConfig"),
    ("micro", {"dit": 3}, "model.dit is 3; give a group of fields of NextDiTConfig"),
    ("micro", {"queries": {"count": 3}}, "model.queries is 16, which has no fields count"),
    ("micro", {"design": "vae_mse"}, "design 'vae_mse' is unknown; choose one of clip_flow, clip_mse, vae_flow"),
    ("blip3o-8b", {"text_tower": {"dim": 3}}, "model.text_tower is None, which has no fields dim"),
  ],
)
def test_what_is_unknown_is_told(name, overrides, words):
  with pytest.raises(UserError, match=words) as error:
    presets.get(name, overrides)
  assert "\n" not in str(error.value)


def test_remat_reaches_every_stack():
  config = presets.with_remat(presets.get("blip3o-8b"), "dots")
  stacks = [config.backbone.text, config.backbone.vision, config.dit, config.clip, config.unet]
  assert {stack.remat for stack in stacks} == {"dots"} and presets.difference(presets.get("blip3o-8b"), config) == {}
  with pytest.raises(UserError, match="none, full, dots"):
    presets.with_remat(config, "some")
