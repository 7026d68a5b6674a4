"""Recordings of SigLIP and the Sana decoder with other arrays, weights and settings than the bundled ones."""

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
