"""The recipes in configs/: the numbers of the release and the paper, and that every one of them builds."""

import jax
import pytest
from helpers import GOLDEN

from blip3o_jax.data.pipeline import DataConfig
from blip3o_jax.sharding.mesh import make_mesh
from blip3o_jax.training import state, trainer
from blip3o_jax.training.config import leaves, load_config

RECIPES = sorted((GOLDEN.parent.parent / "configs").glob("*.py"))

# The table of pre-training (spec 11.1) and the sections it refers to.
PRETRAIN = {
  "seed": 42,
  "steps": 150_000,
  "batch_size": 512,
  "accumulate": 1,
  "objective": "generation",
  "objective_args.drop": 0.1,  # spec 3.2
  "objective_args.times": "discrete",
  "trainable": ("dit/", "queries/"),
  "data.image_size": 448,
  "data.resize": "crop",  # spec 5.4
  "data.max_length": 512 - 64,
  "data.form": "training",  # spec 4.2
  "data.wording": "release",
  "data.workers": 4,
  "optimizer.name": "adamw",
  "optimizer.learning_rate": 1e-4,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "optimizer.eps": 1e-8,
  "optimizer.weight_decay": 0.0,
  "schedule.name": "cosine_min",
  "schedule.min_ratio": 0.1,  # 1e-5
  "schedule.warmup_ratio": 0.003,
  "schedule.warmup_steps": 0,
  "clip_norm": 1.0,
  "compute_dtype": "bfloat16",
  "ema_decay": 0.0,
  "save_every": 1000,
  "keep": 1,
  "log_every": 1,
}
PAPER = {"objective_args.times": "continuous", "data.wording": "paper", "data.form": "inference"}  # spec 14
TABLES = {
  "pretrain_8b": PRETRAIN | {"model.preset": "blip3o-8b", "init_from": "start-8b"},
  "pretrain_4b": PRETRAIN | {"model.preset": "blip3o-4b", "init_from": "start-4b"},
  "pretrain_8b_paper": PRETRAIN | PAPER | {"model.preset": "blip3o-8b-paper"},
  "pretrain_4b_paper": PRETRAIN | PAPER | {"model.preset": "blip3o-4b-paper"},
}
# Trained parameters: DiT and queries (spec 2.1).
TRAINED = {"pretrain_8b": 1_365_239_712, "pretrain_4b": 1_362_388_896}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_numbers(recipe):
  found = leaves(load_config(recipe))
  assert {key: found.get(key) for key in TABLES[recipe.stem]} == TABLES[recipe.stem]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_the_program_builds(recipe):
  """Shapes and shardings of everything that a run holds; what trains; and data that the pipeline knows."""
  config = load_config(recipe)
  program = trainer.build(config, make_mesh({"data": 1, "fsdp": -1}, devices=jax.devices()[:1]))
  names = {pattern.split("/")[0] for pattern in config.trainable}
  assert set(program.state.trained) == names and set(program.frozen) <= set(program.components)
  assert state.count(program.state.trained) == TRAINED.get(recipe.stem, state.count(program.state.trained))
  DataConfig(**config.data.to_dict())
