"""The layout of the release: real names and shapes, recordings as a release, in and out again, and what can fail."""

import json
import math
import os
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from helpers import GOLDEN, load_golden
from safetensors.numpy import load_file, save_file

from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.porting import convert, release, rules
from blip3o_jax.porting.locate import convert_model, open_model, open_models
from blip3o_jax.porting.source import abstract_params

# Spec 2.1, 2.7, 10.3 to 10.5.
PARAMETERS = {
  "8b": {"backbone": 8_289_328_128, "queries": 229_376, "dit": 1_365_010_336, "clip": 4_350_208_256},
  "4b": {"backbone": 3_754_074_112, "queries": 131_072, "dit": 1_362_257_824},
}
DECODER = {"unet": 2_525_520_644, "vae": 83_653_863}
# config.json of Qwen2.5-VL-Instruct on the hub, as far as it bears on shapes.
QWEN = {
  "8b": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
  | {"intermediate_size": 18944, "tie_word_embeddings": False, "vocab_size": 152064},
  "4b": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
  | {"intermediate_size": 11008, "tie_word_embeddings": True, "vocab_size": 151936},
}
COMMON = {
  "model_type": "qwen2_5_vl",
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
SDXL_UNET = {
  "_class_name": "UNet2DConditionModel",
  "sample_size": 128,
  "in_channels": 4,
  "out_channels": 4,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "block_out_channels": [320, 640, 1280],
  "layers_per_block": 2,
  "transformer_layers_per_block": [1, 2, 10],
  "attention_head_dim": [5, 10, 20],
  "use_linear_projection": True,
  "cross_attention_dim": 1792,
  "addition_embed_type": "text_time",
  "addition_time_embed_dim": 256,
  "norm_num_groups": 32,
  "norm_eps": 1e-05,
}
SDXL_VAE = {
  "_class_name": "AutoencoderKL",
  "in_channels": 3,
  "latent_channels": 4,
  "block_out_channels": [128, 256, 512, 512],
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "scaling_factor": 0.13025,
}
SDXL_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012} | {
  "num_train_timesteps": 1000,
  "timestep_spacing": "leading",
  "steps_offset": 1,
  "prediction_type": "epsilon",
}


def write_json(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


def hollow(path, shapes):
  """A bfloat16 safetensors file with a true header and a hole in the place of its arrays."""
  header, offset = {}, 0
  for key, shape in shapes.items():
    size = 2 * math.prod(shape)
    header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
    offset += size
  text = json.dumps(header).encode()
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(struct.pack("<Q", len(text)) + text)
  os.truncate(path, 8 + len(text) + offset)


@pytest.mark.parametrize("size", ["8b", "4b"])
def test_every_tensor_of_the_release_has_its_place(tmp_path, size):
  keys = json.loads((GOLDEN / "keys" / f"blip3o_{size}.json").read_text())
  names = list(keys)
  cuts = [names[: len(names) // 3], names[len(names) // 3 : len(names) // 2], names[len(names) // 2 :]]
  weight_map = {}
  for i, some in enumerate(cuts):
    file = f"model-{i + 1:05d}-of-00003.safetensors"
    hollow(tmp_path / file, {key: keys[key] for key in some})
    weight_map |= dict.fromkeys(some, file)
  write_json(tmp_path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
  vision = {"vision_config": {"out_hidden_size": QWEN[size]["hidden_size"]}}
  write_json(tmp_path / "config.json", COMMON | QWEN[size] | vision)
  decoder = tmp_path / "diffusion-decoder"
  for part, config in (("unet", SDXL_UNET), ("vae", SDXL_VAE)):
    shapes = json.loads((GOLDEN / "keys" / f"{part}.json").read_text())
    hollow(decoder / part / "diffusion_pytorch_model.bf16.safetensors", shapes)
    write_json(decoder / part / "config.json", config)
  write_json(decoder / "scheduler" / "scheduler_config.json", SDXL_SCHEDULER)

  source = open_model(tmp_path)
  source.check()
  assert source.config() == presets.get(f"blip3o-{size}") and not source.overrides
  counts = {}
  for name in source.components:
    specs, _ = source.reference(name)
    counts[name] = sum(math.prod(spec.shape) for spec in specs.values())
  assert counts == PARAMETERS[size] | DECODER
  # The head of the smaller model is its input table, which its list has twice.
  assert source.dropped() == (["lm_head.weight"] if size == "4b" else [])


# ---- recordings as a release


def arrays_of_the_release(dtype):
  """{file: {key: array}} of a small release, from the recorded models."""
  step, decoder = load_golden("blip3o_train_step").weights, load_golden("sdxl_decoder").weights
  pick = lambda prefix: {k.removeprefix(prefix): v for k, v in decoder.items() if k.startswith(prefix)}
  files = {"model": step, "diffusion-decoder/unet": pick("unet."), "diffusion-decoder/vae": pick("vae.")}
  return {file: {key: array.astype(dtype) for key, array in arrays.items()} for file, arrays in files.items()}


def make_release(path, dtype=np.float32, shards=2, rename=lambda key: key):
  arrays = arrays_of_the_release(dtype)
  model = {rename(key): array for key, array in arrays["model"].items()}
  names = sorted(model)
  weight_map = {}
  path.mkdir(parents=True)
  for i in range(shards):
    file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
    save_file({key: model[key] for key in names[i::shards]}, path / file)
    weight_map |= dict.fromkeys(names[i::shards], file)
  write_json(path / "model.safetensors.index.json", {"weight_map": weight_map})
  step, decoder = load_golden("blip3o_train_step").config, load_golden("sdxl_decoder").config
  write_json(path / "config.json", step["qwen"] | {"vision_cfg": step["eva"], "gen_pooling": step["gen_pooling"]})
  for part in ("unet", "vae"):
    folder = path / "diffusion-decoder" / part
    write_json(folder / "config.json", decoder[part])
    save_file(arrays[f"diffusion-decoder/{part}"], folder / "diffusion_pytorch_model.bf16.safetensors")
  write_json(path / "diffusion-decoder" / "scheduler" / "scheduler_config.json", decoder["scheduler"])
  for file in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(GOLDEN / "tokenizer" / file, path / file)
  return path


def read_back(path):
  files = {"model": load_file(path / "model.safetensors")}
  for part in ("unet", "vae"):
    name = f"diffusion-decoder/{part}"
    (file,) = (path / name).glob("*.safetensors")
    files[name] = load_file(file)
  return files


def same_bits(a, b):
  assert a.keys() == b.keys()
  for key, x in a.items():
    assert x.dtype == b[key].dtype and x.shape == b[key].shape and x.tobytes() == b[key].tobytes(), key


@pytest.mark.parametrize(
  ("dtype", "format"),
  [(np.float32, None), (np.float16, None), (ml_dtypes.bfloat16, None), (ml_dtypes.bfloat16, "orbax")],
  ids=["float32", "float16", "bfloat16", "bfloat16-orbax"],
)
def test_in_and_out_again_to_the_bit(tmp_path, dtype, format):
  make_release(tmp_path / "in", dtype)
  convert_model(tmp_path / "in", tmp_path / "here", format=format)
  convert_model(tmp_path / "here", tmp_path / "out", format="safetensors")
  for file, arrays in arrays_of_the_release(dtype).items():
    same_bits(read_back(tmp_path / "out")[file], arrays)
  # The hash is of the numbers, wherever they lie.
  hashes = {
    name: [open_model(tmp_path / d).content_hash(name) for d in ("in", "here", "out")] for name in ("dit", "vae")
  }
  assert all(len(set(found)) == 1 for found in hashes.values())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_the_releases_own_code_reads_is_there(tmp_path, dtype):
  """Its builder.py, blip3o_arch.py and inference.py; without these it drops the weights of the DiT, or stops."""
  convert_model(make_release(tmp_path / "in"), tmp_path / "out", format="safetensors", dtype=dtype)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  recorded = load_golden("blip3o_train_step").config
  assert "eva" in config["gen_vision_tower"] and config["vision_tower_pretrained"] == ""
  assert (config["n_query"], config["gen_pooling"]) == (recorded["n_query"], recorded["gen_pooling"])
  assert config["mm_use_im_patch_token"] is config["mm_use_im_start_end"] is False
  for file in ("tokenizer.json", "tokenizer_config.json"):  # has the three tokens: to the bit
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "in" / file).read_bytes()

  decoder = tmp_path / "out" / "diffusion-decoder"
  index = json.loads((decoder / "model_index.json").read_text())
  assert index["_class_name"][0] == "pipeline_llava_gen"
  assert {path.name for path in decoder.iterdir() if path.is_dir()} == {name for name in index if name[0] != "_"}
  variant = ".bf16" if dtype else ""
  for part in ("unet", "vae"):
    files = {path.name for path in (decoder / part).iterdir()}
    assert files == {"config.json", f"diffusion_pytorch_model{variant}.safetensors"}


def test_a_release_is_loaded_as_it_lies(tmp_path):
  source = open_model(make_release(tmp_path / "in"))
  config, recorded = source.config(), load_golden("blip3o_train_step").config
  assert (config.queries, config.backbone.text.layers) == (recorded["n_query"], 2)
  assert (config.dit.heads, config.dit.kv_heads) == (recorded["dit"]["n_heads"], recorded["dit"]["n_kv_heads"])
  assert config.dit.layers == recorded["dit"]["n_layers"] and config.clip.layers == recorded["eva"]["layers"]
  params = source.read(("queries", "dit"))
  weights = load_golden("blip3o_train_step").weights
  np.testing.assert_array_equal(params["queries"]["latent_queries"], weights["model.latent_queries"][0])
  key = "model.dit.model.layers.1.attn1.to_k.weight"
  np.testing.assert_array_equal(params["dit"]["layers"]["self_k"]["kernel"][1], weights[key].T)
  assert source.tokenizer_dir().joinpath("tokenizer.json").is_file()
  with pytest.raises(UserError, match="no component 'text_tower'; it has backbone, queries, dit, clip, unet, vae"):
    source.read(("text_tower",))


def newer(key):
  """The names of transformers >= 4.52."""
  if key.startswith(("model.layers.", "model.norm.", "model.embed_tokens.")):
    return key.replace("model.", "model.language_model.", 1)
  return f"model.{key}" if key.startswith("visual.") else key


def test_newer_names_are_read_and_the_releases_written(tmp_path):
  make_release(tmp_path / "in", rename=newer)
  assert any(key.startswith("model.language_model.") for key in open_model(tmp_path / "in").weights["backbone"])
  convert_model(tmp_path / "in", tmp_path / "out", format="safetensors")
  same_bits(read_back(tmp_path / "out")["model"], arrays_of_the_release(np.float32)["model"])


@pytest.mark.parametrize("part", ["backbone", "queries", "dit", "clip", "unet", "vae"])
def test_one_part_alone(tmp_path, part):
  make_release(tmp_path / "in")
  convert_model(tmp_path / "in", tmp_path / "part", format="safetensors", part=part)
  alone, whole = open_model(tmp_path / "part"), open_model(tmp_path / "in")
  assert alone.components == (part,) and alone.content_hash(part) == whole.content_hash(part)
  assert getattr(alone.config(), part) == getattr(whole.config(), part)


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
  make_release(tmp_path / "in")
  monkeypatch.setattr(release, "_SHARD", 300_000)
  convert_model(tmp_path / "in", tmp_path / "out", format="safetensors")
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
  assert files[0].endswith(f"-of-{len(files):05d}.safetensors")
  expected = arrays_of_the_release(np.float32)["model"]
  assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
  same_bits({key: load_file(tmp_path / "out" / file)[key] for key, file in index["weight_map"].items()}, expected)
  assert all((tmp_path / "out" / file).stat().st_size < 320_000 for file in files)
  assert open_model(tmp_path / "out").content_hash("dit") == open_model(tmp_path / "in").content_hash("dit")


# ---- starting points


def test_qwen_alone_is_made_ready_for_the_queries(tmp_path):
  """Spec 4.1: the padded tables are cut, three tokens are added, and their rows are the mean of all others."""
  golden = load_golden("qwen2_5_vl")
  folder = tmp_path / "qwen"
  folder.mkdir()
  save_file(dict(golden.weights), folder / "model.safetensors")
  write_json(folder / "config.json", json.loads((golden.path / "config_flat.json").read_text()))
  for file in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(GOLDEN / "tokenizer" / file, folder / file)
  backend = json.loads((folder / "tokenizer.json").read_text())
  backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] not in ("[IMG]", "[/IMG]", "<image>")]
  write_json(folder / "tokenizer.json", backend)

  convert_model(folder, tmp_path / "out")
  source = open_model(tmp_path / "out")
  base = 574  # entries of that tokenizer without the three
  assert source.components == ("backbone",) and source.config().backbone.text.vocab == base + 3
  text = source.read(("backbone",))["backbone"]["text"]
  table, head = golden.weights["model.embed_tokens.weight"], golden.weights["lm_head.weight"]
  np.testing.assert_array_equal(text["embedding"][:base], table[:base])
  np.testing.assert_allclose(text["embedding"][base:], np.tile(table[:base].mean(0), (3, 1)), rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(text["head"], head[: base + 3].T)
  assert source.config().dit.condition_dim == source.config().backbone.text.dim


@pytest.mark.parametrize("layout", ["fast", "as Qwen ships it", "slow"])
def test_a_tokenizer_without_the_releases_tokens_gets_them(tmp_path, layout):
  """Its loader cuts the tables to the tokenizer's length, so ids in memory alone are out of range."""
  transformers = pytest.importorskip("transformers")
  make_release(tmp_path / "in")
  fast = json.loads((tmp_path / "in" / "tokenizer.json").read_text())
  settings = json.loads((tmp_path / "in" / "tokenizer_config.json").read_text())
  of_the_release = ("[IMG]", "[/IMG]", "<image>")
  ids = {token["content"]: token["id"] for token in fast["added_tokens"]}
  expected = [ids[name] for name in of_the_release]
  fast["added_tokens"] = [token for token in fast["added_tokens"] if token["content"] not in of_the_release]
  settings["additional_special_tokens"] = [
    name for name in settings["additional_special_tokens"] if name not in of_the_release
  ]
  del settings["added_tokens_decoder"]
  if layout != "fast":
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    write_json(tmp_path / "in" / "vocab.json", fast["model"]["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in fast["model"]["merges"]]
    (tmp_path / "in" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    settings["added_tokens_decoder"] = {
      str(token["id"]): {key: x for key, x in token.items() if key != "id"} for token in fast["added_tokens"]
    }
  write_json(tmp_path / "in" / "tokenizer_config.json", settings)
  if layout == "slow":
    (tmp_path / "in" / "tokenizer.json").unlink()
  else:
    write_json(tmp_path / "in" / "tokenizer.json", fast)

  convert_model(tmp_path / "in", tmp_path / "out", format="safetensors")
  read = transformers.AutoTokenizer.from_pretrained(open_model(tmp_path / "out").tokenizer_dir())
  assert read.convert_tokens_to_ids(list(of_the_release)) == expected
  assert len(read) == max(expected) + 1 == len(ids) + len(fast["model"]["vocab"])
  assert read("a [IMG]<image>").input_ids[-2:] == [expected[0], expected[2]]
  assert "<image>" not in read.decode(expected, skip_special_tokens=True)
  if layout != "slow":  # what the tokenizers library alone goes by
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert [backend.token_to_id(name) for name in of_the_release] == expected
  if layout != "fast":  # what the slow class of transformers 4 goes by
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    named = {int(i): token["content"] for i, token in written["added_tokens_decoder"].items()}
    assert [named[i] for i in expected] == list(of_the_release)
    assert set(of_the_release) <= set(written["additional_special_tokens"])


@pytest.mark.parametrize("text", ["qwen3", "llama_rope_scaled"])
def test_another_language_model_alone_is_left_as_it_is(tmp_path, text):
  """Without a tokenizer nothing says how many of its rows are tokens."""
  golden = load_golden(text)
  weights = {key: array.astype(ml_dtypes.bfloat16) for key, array in golden.weights.items()}
  rows = release.QWEN_TOKENS + 271  # as many as the public Qwen3 checkpoints have
  weights["model.embed_tokens.weight"] = np.zeros((rows, golden.config["hidden_size"]), ml_dtypes.bfloat16)
  weights.pop("lm_head.weight", None)
  save_file(weights, tmp_path / "model.safetensors")
  write_json(tmp_path / "config.json", golden.config)
  source = open_model(tmp_path)
  source.check()
  assert source.config().backbone.vocab == rows


@pytest.mark.parametrize(
  ("text", "tower", "preset"),
  [("qwen3", True, "blip3o-qwen3-siglip2"), ("llama_rope_scaled", False, "blip3o-study")],
)
def test_the_other_backbones_in_and_out_again(tmp_path, text, tower, preset):
  """Spec 8: recognised by their keys, whatever the config calls itself; what they see with is written too."""
  golden, siglip = load_golden(text), load_golden("siglip")
  dim, width = golden.config["hidden_size"], siglip.config["hidden_size"]
  weights = dict(golden.weights) | {"model.latent_queries": np.ones((1, 5, dim), np.float32)}
  config = golden.config | {"model_type": "some_name_of_its_own"}
  if tower:
    weights |= {f"model.vision_tower.vision_tower.{key}": array for key, array in siglip.weights.items()}
    for i, shape in ((0, (dim, width)), (2, (dim, dim))):
      weights[f"model.mm_projector.{i}.weight"] = np.ones(shape, np.float32)
      weights[f"model.mm_projector.{i}.bias"] = np.ones(dim, np.float32)
    config["vision_config"] = siglip.config
  (tmp_path / "in").mkdir()
  save_file(weights, tmp_path / "in" / "model.safetensors")
  write_json(tmp_path / "in" / "config.json", config)

  source = open_model(tmp_path / "in")
  assert source.preset == preset and source.components == ("backbone", "queries")
  assert type(source.config().backbone) is type(presets.get(preset).backbone)
  assert (source.config().queries, source.config().dit.condition_dim) == (5, dim)
  convert_model(tmp_path / "in", tmp_path / "orbax", format="orbax")
  convert_model(tmp_path / "orbax", tmp_path / "out", format="safetensors")
  same_bits(load_file(tmp_path / "out" / "model.safetensors"), weights)
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert open_model(tmp_path / "out").config() == source.config()
  backbone = source.config().backbone
  again = type(backbone).from_reference(written, {key: array.shape for key, array in weights.items()})
  assert not presets.difference(backbone, again)
  processor = tmp_path / "out" / "preprocessor_config.json"
  assert processor.exists() == tower
  if tower:
    size = siglip.config["image_size"]
    assert json.loads(processor.read_text())["size"] == {"height": size, "width": size}


@pytest.mark.parametrize("names", ["released", "training branch"])
def test_the_siglip_and_sana_autoencoder(tmp_path, names):
  """Spec 7.3: one file of three parts, under the names of the release or of the branch that trained it."""
  model = presets.get("blip3o-siglip2-sana")
  abstract = abstract_params(model, ("clip", "unet", "vae"))
  specs = {name: convert.reference_specs(rules.get(name, model), abstract[name]) for name in abstract}
  released = names == "released"
  own = {
    "clip": lambda key: f"encoder.model.{key}" if released else f"encoder.{key}",
    "unet": lambda key: key if released else key.removeprefix("transformer."),
    "vae": lambda key: f"vae.{key}",
  }
  shapes = {own[name](key): spec.shape for name, found in specs.items() for key, spec in found.items()}
  shapes[own["clip"]("vision_model.head.probe")] = (1, 1, 1152)  # the pooling head, which nothing here reads
  first = {key.split(".")[0] for key in shapes}
  assert first == {"encoder", "transformer", "vae", *(() if released else ("connector",))}
  hollow(tmp_path / "in" / "model.safetensors", shapes)
  write_json(tmp_path / "in" / "config.json", {"num_pooled_tokens": 64})

  source = open_model(tmp_path / "in")
  source.check()
  assert source.config() == model and set(source.components) == {"clip", "unet", "vae"}
  count = lambda name: sum(math.prod(spec.shape) for spec in source.reference(name)[0].values())
  assert (count("clip"), count("unet"), count("vae")) == (413_534_448, 1_604_462_752 + 7_969_536, 312_250_275)
  assert source.dropped() == ["vision_model.head.probe"]
  assert source.sampling == {"decoder_steps": 30, "decoder_solver": "dpm++", "decoder_null": "image"}
  with pytest.raises(UserError, match="no place for any of its parts"):
    release.write(source, tmp_path / "out")
  assert not (tmp_path / "out").exists()

  # A backbone that draws with them goes out without them.
  for name in ("qwen3", "siglip"):
    golden = load_golden(name)
    (tmp_path / name).mkdir()
    save_file(golden.weights, tmp_path / name / "model.safetensors")
    write_json(tmp_path / name / "config.json", golden.config)
  whole = open_models([tmp_path / "qwen3", tmp_path / "siglip", tmp_path / "in"])
  assert whole.preset == "blip3o-siglip2-sana"
  assert release.write(whole, tmp_path / "out")[1] == ["clip", "unet", "vae"]
  assert open_model(tmp_path / "out").content_hash("backbone") == whole.content_hash("backbone")


@pytest.mark.parametrize("layout", ["qkv.bias", "q_bias"])
def test_eva_clip_alone(tmp_path, layout):
  golden = load_golden("eva_clip")
  weights = dict(golden.weights)
  if layout == "q_bias":  # the original layout has no bias for keys
    for key in [key for key in weights if key.endswith("qkv.bias")]:
      q, k, v = np.split(weights.pop(key), 3)
      weights |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
  weights["norm.weight"] = weights["head.bias"] = np.ones(3, np.float32)
  folder = tmp_path / "eva"
  folder.mkdir()
  save_file(weights, folder / "eva_clip.safetensors")
  write_json(folder / "config.json", golden.config)
  lines = convert_model(folder / "eva_clip.safetensors", tmp_path / "out")
  assert sorted(line.rpartition(" ")[2] for line in lines[:2]) == ["head.bias", "norm.weight"]
  clip = open_model(tmp_path / "out").read(("clip",))["clip"]
  expected = golden.weights["blocks.1.attn.qkv.bias"]
  np.testing.assert_array_equal(clip["layers"]["q"]["bias"][1], np.split(expected, 3)[0])
  keys = np.split(expected, 3)[1]
  np.testing.assert_array_equal(clip["layers"]["k"]["bias"][1], keys if layout == "qkv.bias" else 0 * keys)


# ---- trouble


def edit(path, change):
  arrays = load_file(path)
  change(arrays)
  save_file(arrays, path)


def test_all_problems_are_told_and_the_target_stays(tmp_path):
  folder = make_release(tmp_path / "in", shards=1)
  key = "model.dit.model.layers.0.gate"

  def change(arrays):
    arrays["model.dit.model.stranger"] = np.zeros(2, np.float32)
    arrays["model.norm.weight"] = np.zeros(7, np.float32)
    arrays["model.layers.0.input_layernorm.weight"] = np.zeros(
      arrays["model.layers.0.input_layernorm.weight"].shape, np.int32
    )
    del arrays["model.dit.model.norm_out.linear_1.bias"]

  file = folder / "model-00001-of-00001.safetensors"
  edit(file, change)
  (folder / "model.safetensors.index.json").unlink()
  vae = folder / "diffusion-decoder" / "vae" / "diffusion_pytorch_model.bf16.safetensors"
  edit(vae, lambda arrays: arrays.pop("encoder.conv_in.bias"))
  (tmp_path / "out").mkdir()
  with pytest.raises(UserError) as error:
    convert_model(folder, tmp_path / "out")
  for text in (
    "does not fit the model, 5 problems",
    "model.stranger: expected no such key",
    "model.norm.weight: expected [",
    "found [7]",
    "model.layers.0.input_layernorm.weight: expected floating-point numbers, found int32",
    "model.norm_out.linear_1.bias: expected [",
    "encoder.conv_in.bias: expected [",
  ):
    assert text in str(error.value), text
  assert not list((tmp_path / "out").iterdir()) and sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
  assert key in load_file(file)


def test_broken_files_are_told_together(tmp_path):
  folder = make_release(tmp_path / "in")
  (folder / "model-00002-of-00002.safetensors").unlink()
  vae = folder / "diffusion-decoder" / "vae" / "diffusion_pytorch_model.bf16.safetensors"
  vae.write_bytes(vae.read_bytes()[:-4])
  with pytest.raises(UserError) as error:
    open_model(folder)
  assert "model-00002-of-00002.safetensors: no such file" in str(error.value)
  assert "diffusion_pytorch_model.bf16.safetensors: corrupt or truncated" in str(error.value)


def test_what_is_no_model(tmp_path):
  (tmp_path / "notes.txt").write_text("hello")
  with pytest.raises(UserError, match="not a model"):
    open_model(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(UserError, match=r"pickled weights are refused.*torch\.load\('pytorch_model.bin'"):
    open_model(tmp_path)
  with pytest.raises(UserError, match="no such model"):
    open_model(tmp_path / "absent")
  folder = make_release(tmp_path / "in")
  write_json(folder / "config.json", {"hidden_size": 3})
  with pytest.raises(UserError, match="config.json: cannot be understood"):
    open_model(folder)


def test_nothing_else_is_overwritten(tmp_path):
  folder = make_release(tmp_path / "in")
  write_json(tmp_path / "mine" / "thesis.txt", "years of work")
  for format in (None, "orbax", "safetensors"):
    with pytest.raises(UserError, match="not empty and not a model"):
      convert_model(folder, tmp_path / "mine", format=format)
  with pytest.raises(UserError, match="no part 'heart' to write; choose one of backbone"):
    convert_model(folder, tmp_path / "out", format="safetensors", part="heart")
  with pytest.raises(UserError, match="--part goes with"):
    convert_model(folder, tmp_path / "out", part="dit")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "mine"]
  assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def everything(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_not_taken_for_a_model(tmp_path):
  """It has a config.json too."""
  source, run = make_release(tmp_path / "in"), tmp_path / "run"
  for file in ("config.json", "metrics.jsonl", "checkpoints/3/state", "model/model.json"):
    write_json(run / file, {})
  before = everything(run)
  with pytest.raises(UserError, match="run: holds checkpoints/3/state, which is no part of a model"):
    convert_model(source, run, format="safetensors")
  assert everything(run) == before


def test_a_release_is_replaced_unless_something_was_added(tmp_path):
  source, out = make_release(tmp_path / "in"), tmp_path / "out"
  for format, dtype in (("safetensors", "bfloat16"), ("safetensors", None)):
    convert_model(source, out, format=format, dtype=dtype)
  same_bits(read_back(out)["model"], arrays_of_the_release(np.float32)["model"])
  (out / "diffusion-decoder" / "pipeline_llava_gen.py").write_text("their code")
  before = everything(out)
  with pytest.raises(UserError, match="out: holds diffusion-decoder/pipeline_llava_gen.py, which"):
    convert_model(source, out, format="safetensors")
  assert everything(out) == before
  (out / "diffusion-decoder" / "pipeline_llava_gen.py").unlink()
  for read, part in ((out, "vae"), (out / "diffusion-decoder", None)):
    with pytest.raises(UserError, match="which is read, lies there; choose another place"):
      convert_model([source, read], out, format="safetensors", part=part)
  with pytest.raises(UserError, match="config.json: is a file; choose another place"):
    convert_model(source, out / "config.json", format="safetensors")


# ---- what the other libraries make of it


def test_transformers_loads_the_backbone_bit_equal(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from safetensors.torch import load_file as load_tensors

  make_release(tmp_path / "in", ml_dtypes.bfloat16)
  for part in (None, "backbone"):
    out = tmp_path / f"out_{part}"
    convert_model(tmp_path / "in", out, format="safetensors", part=part)
    model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
      out, output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # transformers renames what follows "model." before it looks for its place.
    unexpected = {key.replace("model.language_model.", "model.", 1) for key in info["unexpected_keys"]}
    stored = load_tensors(out / "model.safetensors")
    others = ("model.dit.", "model.latent_queries", "model.gen_vision_tower.")
    assert unexpected == {key for key in stored if key.startswith(others)} and bool(unexpected) == (part is None)
    for key, tensor in model.state_dict().items():
      old = key.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
      assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, stored[old]), key


def test_diffusers_loads_the_decoder_without_a_warning(tmp_path, caplog):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  make_release(tmp_path / "in")
  convert_model(tmp_path / "in", tmp_path / "out", format="safetensors")
  diffusers.utils.logging.enable_propagation()
  for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
    convert_model(tmp_path / "in", tmp_path / part, format="safetensors", part=part)
    for folder in (tmp_path / "out" / "diffusion-decoder" / part, tmp_path / part):
      # The default wants accelerate, and warns without it.
      model, info = kind.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
      assert not any(info.values()), info
      expected = arrays_of_the_release(np.float32)[f"diffusion-decoder/{part}"]
      same_bits({key: tensor.numpy() for key, tensor in model.state_dict().items()}, expected)
  scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "diffusion-decoder" / "scheduler")
  assert scheduler.config.timestep_spacing == "leading" and scheduler.config.steps_offset == 1
  assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


PIPELINE = """
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPImageProcessor

class EmuVisualGenerationPipeline(DiffusionPipeline):
  def __init__(self, tokenizer, multimodal_encoder, scheduler: EulerDiscreteScheduler, unet: UNet2DConditionModel,
               vae: AutoencoderKL, feature_extractor: CLIPImageProcessor, safety_checker):
    super().__init__()
    self.register_modules(
      tokenizer=tokenizer, multimodal_encoder=multimodal_encoder, scheduler=scheduler, unet=unet, vae=vae,
      feature_extractor=feature_extractor, safety_checker=safety_checker,
    )
"""


def test_diffusers_loads_the_decoder_as_the_release_does(tmp_path):
  """With a pipeline that takes what the release's takes; that file is not ours to write."""
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  make_release(tmp_path / "in", ml_dtypes.bfloat16)
  convert_model(tmp_path / "in", tmp_path / "out", format="safetensors")
  decoder = tmp_path / "out" / "diffusion-decoder"
  (decoder / "pipeline_llava_gen.py").write_text(PIPELINE)
  pipe = diffusers.DiffusionPipeline.from_pretrained(
    str(decoder),
    custom_pipeline="pipeline_llava_gen",
    torch_dtype=torch.bfloat16,
    use_safetensors=True,
    variant="bf16",
    multimodal_encoder=torch.nn.Linear(1, 1),
    tokenizer=None,
    safety_checker=None,
    trust_remote_code=True,
    low_cpu_mem_usage=False,
  )
  expected = arrays_of_the_release(ml_dtypes.bfloat16)
  for part, model in (("unet", pipe.unet), ("vae", pipe.vae)):
    found = {key: tensor.view(torch.int16).numpy() for key, tensor in model.state_dict().items()}
    same_bits(found, {key: array.view(np.int16) for key, array in expected[f"diffusion-decoder/{part}"].items()})
