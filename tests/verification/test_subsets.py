"""Recordings with other arrays, weights and settings than the bundled ones."""

import json
import shutil

import numpy as np
import pytest
from helpers import GOLDEN
from safetensors.numpy import load_file, save_file

from blip3o_jax import verification
from blip3o_jax.errors import UserError


@pytest.fixture
def vary(tmp_path):
  """`vary(component, ...)` -> the directory of a copy: other arrays (None = left out), weights by `rename`, config."""

  def make(name, arrays=None, keep=None, rename=None, config=None):
    copy = tmp_path / name
    shutil.copytree(GOLDEN / name, copy)
    with np.load(copy / "io.npz") as stored:
      io = {k: v for k, v in stored.items() if keep is None or k in keep}
    io |= arrays or {}
    np.savez(copy / "io.npz", **{k: v for k, v in io.items() if v is not None})
    (weights,) = copy.glob("*.safetensors")
    if rename:
      save_file({new: v for k, v in load_file(weights).items() if (new := rename(k))}, weights)
    settings = json.loads((copy / "config.json").read_text()) | (config or {})
    (copy / "config.json").write_text(json.dumps(settings))
    return copy

  return make


def statuses(directory):
  return {line.name: line.status for line in verification.replay(directory)}


def test_siglip_without_its_head_and_with_other_arrays(vary):
  with np.load(GOLDEN / "siglip" / "io.npz") as io:
    last = io["last_layer_out_before_post_layernorm"]
    pooled = io["penultimate_layer_out"].mean(axis=1, keepdims=True)
  keep = {"pixel_values", "last_hidden_state"}
  arrays = {"layer2_out": last, "penultimate_pooled": pooled, "layer1_out": last, "layer3_out": last}
  found = statuses(vary("siglip", arrays, keep, rename=lambda k: None if ".head." in k else k))
  told = {k: found[k] for k in ("last_hidden_state", "layer2_out", "penultimate_pooled", "layer1_out", "layer3_out")}
  assert list(told.values()) == ["ok", "ok", "ok", "miss", "miss"]  # layer 1 is not the last, layer 3 does not exist
  assert "pooler_output" not in found


def test_penultimate_pooled_to_no_square(vary):
  directory = vary("siglip", {"penultimate_pooled": np.zeros((2, 3, 48), np.float32)})
  with pytest.raises(UserError, match="not a square"):
    verification.replay(directory)


SAMPLING = {"z_latents", "null_z_latents", "sample_init_noise", "sample_after1", "dpm_sigmas"}


@pytest.mark.parametrize(
  "keep, inputs, compared",
  [
    ({"x", "timestep", "z_latents", "null_z_latents", "act_block0"}, {"x", "timestep", "z_latents"}, {"act_block0"}),
    ({"dcae_encode_in", "dcae_latent"}, {"dcae_encode_in"}, {"dcae_latent"}),
    ({"dpm_timesteps", "dpm_sigmas"}, set(), {"dpm_timesteps", "dpm_sigmas"}),
    (SAMPLING, {"z_latents", "null_z_latents", "sample_init_noise"}, {"sample_after1", "dpm_sigmas"}),
  ],
)
def test_parts_of_a_sana_recording(vary, keep, inputs, compared):
  found = statuses(vary("sana_decoder", keep=keep))
  assert {name for name, status in found.items() if status == "input"} == inputs
  assert {name for name, status in found.items() if status == "ok"} == compared
  assert "miss" not in found.values()


CALL, SAMPLER = {"x", "timestep", "z_latents"}, {"z_latents", "null_z_latents", "sample_init_noise"}


@pytest.mark.parametrize(
  "absent, inputs, result",
  [
    *((name, CALL, "act_connector") for name in sorted(CALL)),
    *((name, SAMPLER, "sample_image") for name in sorted(SAMPLER)),
    ("dcae_encode_in", set(), "dcae_latent"),
    ("dcae_scaled_latents", set(), "dcae_decode_out"),
  ],
)
def test_absent_inputs(vary, absent, inputs, result):
  with pytest.raises(UserError, match=f"input '{absent}' is not in io.npz"):
    verification.replay(vary("sana_decoder", keep=inputs - {absent} | {result}))


def test_other_steps_other_layers_and_the_other_wrapper(vary):
  """An array of another step or layer under a wrong name misses; the middle of 8 steps is after 4."""
  with np.load(GOLDEN / "sana_decoder" / "io.npz") as io:
    block, after1 = io["act_block0"], io["sample_after1"]
  keep = {"x", "timestep", "z_latents", "null_z_latents", "sample_init_noise"}
  arrays = {"act_block1": block, "act_block0_out": block, "act_block2": block}
  arrays |= {f"sample_after{n}": after1 for n in (1, 2, 4, 9, "_half")}
  lines = verification.replay(vary("sana_decoder", arrays, keep, rename=lambda key: key.replace("transformer.", "", 1)))
  found = {line.name: line for line in lines}
  assert {name for name in arrays if found[name].status == "ok"} == {"act_block0_out", "sample_after1"}
  assert {name for name in arrays if found[name].status == "miss"} == set(arrays) - {"act_block0_out", "sample_after1"}
  assert found["sample_after_half"].error == found["sample_after4"].error != found["sample_after2"].error


def test_no_guidance(vary):
  """The unconditional features are set aside then, and the trajectory is another."""
  keep = {"z_latents", "null_z_latents", "sample_init_noise", "sample_after1"}
  found = statuses(vary("sana_decoder", keep=keep, config={"guidance_scale": 1.0}))
  assert (found["null_z_latents"], found["sample_after1"]) == ("not compared", "miss")


def guided(start, after, sigmas):
  """The prediction of the first step, x' = x + (sigma' - sigma) v, under three names: the last is another step's."""
  velocity = (after - start) / np.float32(sigmas[1] - sigmas[0])
  return dict.fromkeys(("guided_step1", "sample_guided_pred_step1", "guided_step2"), velocity)


def test_several_pictures_of_each_condition(vary):
  """Two starts a row: the unconditional features are repeated as the conditions are."""
  keep = {"z_latents", "null_z_latents", "sample_init_noise", "sample_after1", "sample_after3"}
  with np.load(GOLDEN / "sana_decoder" / "io.npz") as io:
    arrays = {name: io[name].repeat(2, axis=0) for name in keep if name.startswith("sample_")}
    arrays |= guided(arrays["sample_init_noise"], arrays["sample_after1"], io["dpm_sigmas"])
  found = statuses(vary("sana_decoder", arrays, keep))
  assert [found[name] for name in ("sample_after1", "sample_after3")] == ["ok", "ok"]
  assert [found[name] for name in arrays if "guided" in name] == ["ok", "ok", "miss"]


def test_names_of_guided_predictions_of_a_group(vary):
  with np.load(GOLDEN / "blip3o_generate" / "io.npz") as io:
    arrays = guided(io["empty:init_noise"], io["empty:latents_after1"], [1.0, 29 / 30])
    keep = {name for name in io if name.startswith("empty:")}
  arrays = {f"empty:{name}": array for name, array in arrays.items()}
  found = statuses(vary("blip3o_generate", arrays, keep))
  assert [found[name] for name in arrays] == ["ok", "ok", "miss"]


def test_prompts_need_no_vision_tower(vary):
  """The weights of a recording from prompt to features are the language model's, the queries' and the DiT's."""
  settings = json.loads((GOLDEN / "blip3o_generate" / "config.json").read_text())
  del settings["qwen"]["vision_config"]
  text = lambda key: None if key.startswith("visual.") else key
  keep = {"single:input_ids", "single:attention_mask", "single:query_hidden_states", "single:init_noise"}
  found = statuses(vary("blip3o_generate", keep=keep, rename=text, config=settings))
  assert found["single:query_hidden_states"] == "ok" and "miss" not in found.values()


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
@pytest.mark.parametrize("folder, prefix", [("llama", "left:"), ("qwen2_5_vl", "mm:"), ("blip3o_generate", "single:")])
def test_an_absent_input_of_a_group(vary, folder, prefix, name):
  keep = {f"{prefix}{other}" for other in ("input_ids", "attention_mask", "logits", "query_hidden_states")}
  with pytest.raises(UserError, match=f"{folder}: the input '{prefix}{name}' is not in io.npz"):
    verification.replay(vary(folder, keep=keep - {f"{prefix}{name}"}))


ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
  "folder, arrays, config",
  [
    ("eva_clip", {"image": ONES[0]}, {}),  # too few axes
    ("next_dit", {"z_latents": np.ones((4, 10, 63), np.float32)}, {}),  # of another width than the weights
    ("llama", {"left:input_ids": ONES.astype(np.int32)}, {}),  # of another length than the mask
    ("blip3o_generate", {}, {"steps": None}),
    ("eva_clip", {}, {"gen_pooling": "early_pool2d"}),  # no number
    ("eva_clip", {}, {"vision_cfg": [1]}),
    ("siglip", {}, {"num_attention_heads": 0}),
  ],
)
def test_what_does_not_fit_is_an_input_error_in_one_line(vary, folder, arrays, config):
  with pytest.raises(UserError) as error:
    verification.replay(vary(folder, arrays, config=config))
  assert folder in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600
