"""What the loader is told about pictures, for each kind of backbone; what reaches the devices and what is counted."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import sharded
import tiny

from blip3o_jax.data import shapes_corpus
from blip3o_jax.data.tokenizer import train_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.models import presets
from blip3o_jax.porting.locate import open_model
from blip3o_jax.sharding import rules
from blip3o_jax.sharding.mesh import make_mesh
from blip3o_jax.training import feed, trainer
from blip3o_jax.training.defaults import default_config


def asked_for(task, backbone):
  """What the pipeline is given of the model."""
  config = default_config()
  config.init_from, config.tokenizer = "", ""
  config.data.task, config.data.path = task, "shards"
  return feed.preparation(config, tiny.config(**tiny.BACKBONES[backbone]))


def test_the_tower_of_qwen_says_how_pictures_are_cut():
  asked = asked_for("conversations", "qwen2_5_vl")
  vision = tiny.config().backbone.vision
  pictures = asked["pictures"]
  assert (pictures.window_size, pictures.processor.patch_size) == (vision.window_size, vision.patch_size)
  assert pictures.image_token == tiny.config().backbone.image_token


def test_siglip_says_how_large_pictures_are():
  backbone = tiny.BACKBONES["qwen3_siglip"]["backbone"]
  pictures = asked_for("conversations", "qwen3_siglip")["pictures"]
  assert (pictures.size, pictures.count, pictures.image_token) == (8, 4, backbone.image_token)


def test_llama_sees_no_pictures():
  assert asked_for("generation", "llama")["pictures"] is None


def test_a_tokenizer_that_the_weights_do_not_know_is_refused(tmp_path):
  train_tokenizer(["a yellow square"], 640).save(tmp_path)
  config = default_config()
  config.init_from, config.tokenizer = "micro", str(tmp_path)
  config.data.task, config.data.path = "generation", "shards"
  with pytest.raises(UserError, match=r"tokenizers .* differ in .* weights that learned one cannot read the other"):
    feed.preparation(config, presets.get("micro"))
  config.tokenizer = str(open_model("micro").tokenizer_dir())
  assert len(feed.preparation(config, presets.get("micro"))["tokenizer"]) == 640


VAE_FLOW = sharded.OVERRIDES | {"design": "vae_flow"}
SIZES = ("contrastive", "pretrain", "instruct", "understanding", "text_only", "held_out")


def test_groups_stay_groups_and_what_only_counts_is_counted():
  def batches():
    flags = {"replaced": np.array([True, False]), "cut": np.array([7, 1]), "names": ["a", "b"]}
    yield {"draw": {"pixels": np.zeros((2, 4), np.uint8)} | flags, "see": {"tokens": np.ones((2, 3), np.int32)} | flags}
    yield {"pixels": np.zeros((2, 4), np.uint8), "replaced": np.array([False, True])}

  sharding = rules.batch_sharding(make_mesh({"data": 1}))
  with feed.Prefetch(batches(), sharding) as prefetch:
    batch = next(prefetch)
    assert jax.tree.map(lambda x: x.shape, batch) == {"draw": {"pixels": (2, 4)}, "see": {"tokens": (2, 3)}}
    assert prefetch.counts == {"rows_replaced": 2, "rows_cut": 4}
    assert set(next(prefetch)) == {"pixels"} and prefetch.counts == {"rows_replaced": 3, "rows_cut": 4}


def test_every_group_divides_over_the_devices_and_accumulated_parts():
  config = default_config()
  group = {"task": "images", "path": "shards"}
  config.data.groups = {"draw": {**group, "rows": 3}, "see": {**group, "rows": 1}}
  config.batch_size = 32
  feed.require_whole_groups(config, 8)  # 24 and 8
  config.batch_size = 16  # divides itself, but 4 rows do not
  with pytest.raises(UserError, match="batch_size 16 .* of 3 : 1 rows over 8 parts .* a multiple of 32"):
    feed.require_whole_groups(config, 8)
  config.mesh = {"data": 1}
  config.accumulate = 8
  with pytest.raises(UserError, match="a multiple of 32"):
    trainer.build(trainer.complete(config), make_mesh({"data": 1}))


CHILD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import tiny
from blip3o_jax.errors import UserError
from blip3o_jax.training import feed
from blip3o_jax.training.defaults import default_config

for path in sys.argv[3:]:
  config = default_config()
  config.batch_size, config.data = 2, {"task": "images", "path": path}
  try:
    batch = next(feed.open_loader(config, tiny.config(), (jax.process_index(), 2))(0))
    print("ok", batch["pixels"].shape[0], flush=True)
  except UserError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("changes, words", [
  ({"data": {"task": "images", "path": "nowhere"}}, "nothing at nowhere"),
  ({"data": {"task": "images", "path": "nowhere", "imagesize": 3}}, "unknown keys imagesize"),
  ({"sampling": {"stepz": 3}}, "stepz"),
  ({"data": {"task": "features", "path": "f"}, "model": {"overrides": VAE_FLOW}}, "take data.task generation"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    trainer.train(sharded.config(mesh={"data": 1}, **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_host_without_data_or_with_other_data_stops_all_of_them(tmp_path):
  shapes_corpus.make_shapes(tmp_path / "a", **dict.fromkeys(SIZES, 0) | {"pretrain": 4})
  shapes_corpus.make_shapes(tmp_path / "b", **dict.fromkeys(SIZES, 0) | {"pretrain": 5})
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  a, b, none = (str(tmp_path / name / "pretrain") for name in ("a", "b", "none"))
  paths = [(none, a, a), (a, b, a)]  # of three runs, on each of two processes
  words = [sys.executable, "-c", CHILD, address]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
  processes = [
    subprocess.Popen([*words, str(i), *paths[i]], stdout=subprocess.PIPE, text=True, env=environment) for i in range(2)
  ]
  said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
  first, second = ([line for line in lines if not line.startswith("[Gloo]")] for lines in said)
  assert "nothing at" in first[0] and second[0].startswith("processes [0] could not open their data")
  assert all(lines[1].startswith("processes [1] see other data than process 0") for lines in (first, second))
  assert first[2] == second[2] == "ok 1"
