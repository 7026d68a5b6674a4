"""The paper's choices in miniature, each trained by the trainer on real shards, and its model directory drawn with."""

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from blip3o_jax import cli
from blip3o_jax.data import shapes_corpus
from blip3o_jax.inference.model import load
from blip3o_jax.porting import model_dir
from blip3o_jax.porting.locate import open_model
from blip3o_jax.training import metrics, trainer
from blip3o_jax.training.defaults import default_config

STEPS = 40
DRAWN = ("queries/", "dit/")
# variants of tests/tiny.py, objective and its settings, what it touches beside its own components, what trains
CASES = {
  "CLIP + flow matching on Qwen3": (("qwen3_siglip",), "generation", {}, (), DRAWN),
  "CLIP + MSE on Llama": (
    ("llama", "clip_mse"),
    "regression",
    {"prefix_pass": False},
    (),
    ("queries/", "projection/", "backbone/"),
  ),
  "VAE + flow matching on Llama": (
    ("llama", "vae_flow"),
    "generation",
    {},
    ("backbone", "queries", "dit", "vae"),
    DRAWN,
  ),
  "Understanding on Qwen3": (("qwen3_siglip",), "understanding", {}, (), ("backbone/text/", "backbone/projector/")),
  "Joint on Qwen3": (("qwen3_siglip",), "joint", {}, (), (*DRAWN, "backbone/text/", "backbone/projector/")),
  "SigLIP2 + Sana decoder": (("qwen3_siglip", "sana"), "flow_decoding", {}, (), ("unet/",)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """A few captioned pictures and questions, to be learnt by heart, and a tokenizer."""
  out = tmp_path_factory.mktemp("world") / "shapes"
  none = dict.fromkeys(("contrastive", "instruct", "text_only", "held_out"), 0)
  return shapes_corpus.make_shapes(out, pretrain=8, understanding=8, **none)


@pytest.fixture(autouse=True)
def quick():
  """What runs for a second need not be compiled well."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def settings(world, start, written, objective, args, components, trainable):
  config = default_config()
  config.update(steps=STEPS, batch_size=8, compute_dtype="float32", log_every=1, save_every=STEPS, seed=0)
  config.update(objective=objective, components=components, trainable=trainable, init_from=str(start))
  config.model, config.objective_args = written, args
  pictures = {"task": "images", "path": str(world / "pretrain"), "image_size": 16}
  captions = pictures | {"task": "generation", "max_length": 32}
  questions = {"task": "conversations", "path": str(world / "understanding/questions.jsonl"), "max_length": 96}
  groups = {"groups": {"generation": captions, "understanding": questions}}
  data = {"flow_decoding": pictures, "understanding": questions, "joint": groups}
  config.data = data.get(objective, captions) | {"cache": True}
  config.optimizer.learning_rate, config.schedule.name = 1e-2, "constant"
  if objective in ("generation", "regression", "joint"):
    config.sample_every, config.sample_prompts = STEPS, ("a circle", "a square")
  config.sampling = {"steps": 2, "decoder_steps": 2, "decoder_null": "image"}
  return config


FAST = "CLIP + MSE on Llama"


@pytest.mark.parametrize("case", [c if c == FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_it_trains_and_draws(world, tmp_path, case, capsys):
  variants, objective, args, components, trainable = CASES[case]
  written, params = tiny.written(*variants), tiny.params(0, *variants)
  start = model_dir.write(
    tmp_path / "start",
    **written,
    params={name: tree for name, tree in params.items() if name != "text_tower"},
    tokenizer_dir=world / "tokenizer",
  )
  run = trainer.train(settings(world, start, written, objective, args, components, trainable), tmp_path / "run")
  losses = [line["loss"] for line in metrics.read(run.workdir / "metrics.jsonl")]
  assert np.mean(losses[-8:]) < 0.85 * np.mean(losses[:4]), losses
  names = {name.split("/")[0] for name in trainable}
  before, after = open_model(start), open_model(run.model_dir)
  for name in before.components:
    assert (before.content_hash(name) == after.content_hash(name)) == (name not in names), name

  if "backbone/text/" in trainable:  # the tower, of the same component, is as it was
    seen = [open_model(model).read(("backbone",))["backbone"]["vision"] for model in (start, run.model_dir)]
    jax.tree.map(np.testing.assert_array_equal, *seen)
  if objective == "understanding":
    return
  if objective == "flow_decoding":
    (drawn,) = load(run.model_dir).reconstruct(Image.new("RGB", (20, 20), (200, 30, 30)))
    assert drawn.shape == (16, 16, 3) and drawn.std() > 0
    return
  assert np.asarray(Image.open(run.workdir / "samples" / f"{STEPS}.png")).shape == (16, 32, 3)  # while it trained
  command = ["generate", "--model", run.model_dir, "--prompt", "a circle", "--num", 2, "--out", tmp_path / "drawn"]
  assert cli.main([str(word) for word in command]) == 0
  first, second = (np.asarray(Image.open(tmp_path / "drawn" / f"000-{i}.png"), int) for i in range(2))
  assert first.shape == (16, 16, 3) and first.std() > 0 and (first != second).any()
