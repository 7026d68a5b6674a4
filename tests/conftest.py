"""Before any test imports jax: the CPU, full-precision matmuls, and the `--slow` switch."""

import gc
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers and the processes that tests start compile a program once among them: a tenth of the time of all tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="blip3o-tests-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest
from helpers import load_golden

from blip3o_jax.cli import prepare_jax

prepare_jax()  # what the commands compile, tests compile
gc.set_threshold(50_000, 20, 100)  # tracing makes many objects that stay: looking them through took 4 % of the time

# Recordings were made in float32; a back end that rounds matmul inputs to bf16 would miss every bar. Through the
# environment as well, so that the processes tests start agree.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config):
  """Tests wait for compilers far more than for programs: without LLVM's optimisations all took 13 min 31 s and not
  17 min 39 s (two cores, AMD EPYC, 2026-11-30), and what is large in a program, its products and convolutions, is
  library code. The slow tests run what users run."""
  flags = os.environ.get("XLA_FLAGS", "")
  if not config.getoption("--slow") and "xla_backend_optimization_level" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()


def pytest_unconfigure(config):
  if not hasattr(config, "workerinput") and "blip3o-tests-" in os.environ["JAX_COMPILATION_CACHE_DIR"]:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_addoption(parser):
  parser.addoption("--slow", action="store_true", help="run only the tests marked slow, which are left out otherwise")


def pytest_collection_modifyitems(config, items):
  want_slow = config.getoption("--slow")
  chosen = [item for item in items if (item.get_closest_marker("slow") is not None) == want_slow]
  config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
  items[:] = chosen


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory):
  """The tiny model as a real directory, drawing in two steps."""
  import tiny

  from blip3o_jax.data import shapes_corpus
  from blip3o_jax.data.tokenizer import train_tokenizer
  from blip3o_jax.porting import model_dir

  out = tmp_path_factory.mktemp("model")
  train_tokenizer(shapes_corpus.tokenizer_texts(), shapes_corpus.VOCABULARY).save(out / "tokenizer")
  return model_dir.write(
    out / "tiny",
    preset="micro",
    overrides=tiny.OVERRIDES,
    params=tiny.params(),
    tokenizer_dir=out / "tokenizer",
    sampling={"steps": 2, "decoder_steps": 2},
  )


@pytest.fixture(scope="session")
def golden():
  """`golden("next_dit")` -> namespace of config, weights, io, fixture and path (see helpers.load_golden)."""
  return load_golden
