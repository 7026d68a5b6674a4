"""What an installation brings along: exactly what the package imports, neither torch nor tensorflow, and the assets."""

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "blip3o_jax"
README = (ROOT / "README.md").read_text()
BASELINES = PACKAGE / "benchmarks" / "torch"  # what the extra `torch` is for; benchmarks.run opens it when asked to
# Where the import is called otherwise than what is installed.
MODULE_OF = {
  "orbax-checkpoint": "orbax",
  "pillow": "PIL",
  "absl-py": "absl",
  "tensorflow-datasets": "tensorflow_datasets",
}


def setup_table(name):
  for node in ast.parse((ROOT / "setup.py").read_text()).body:
    if isinstance(node, ast.Assign) and node.targets[0].id == name:
      return ast.literal_eval(node.value)
  raise AssertionError(f"setup.py has no {name}")


def bare(requirement):
  return re.match(r"[A-Za-z0-9_-]+", requirement).group()


def imported_modules():
  """{top-level module: a file that imports it} over the package, the baselines apart."""
  found = {}
  for file in PACKAGE.rglob("*.py"):
    if file.is_relative_to(BASELINES):
      continue
    for node in ast.walk(ast.parse(file.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and node.level == 0:
        names = [node.module]
      found |= {name.split(".")[0]: file.name for name in names}
  return found


def test_base_install_is_what_is_imported():
  third_party = set(imported_modules()) - set(sys.stdlib_module_names) - {"blip3o_jax"}
  third_party -= {"lmms_eval"}  # the harness that calls our adapter: it is there when it does
  third_party -= {"gradio", "fastapi", "uvicorn"}  # of the extra "demo", imported when the page is asked for
  assert third_party == {MODULE_OF.get(bare(r), bare(r)) for r in setup_table("BASE")}


def test_requirements_are_ranges():
  requirements = [*setup_table("BASE"), *(r for extra in setup_table("EXTRAS").values() for r in extra)]
  assert all(">=" in r and "==" not in r for r in requirements), requirements
  assert set(setup_table("EXTRAS")) == {"tpu", "cuda", "gcs", "torch", "tensorboard", "demo", "test"}


def test_every_module_imports_without_torch_and_tensorflow():
  modules = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in PACKAGE.rglob("*.py")
    if file.name != "__main__.py" and not file.is_relative_to(BASELINES)
  )
  code = f"""
import importlib, sys
for name in ("torch", "diffusers", "tensorflow", "tensorboard"):
  sys.modules[name] = None  # an import of it now fails
for name in {modules}:
  importlib.import_module(name)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]


def test_import_and_help_start_no_jax():
  code = "import blip3o_jax, blip3o_jax.cli, sys; blip3o_jax.cli.make_parser(); sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_public_names_resolve():
  import blip3o_jax

  assert all(getattr(blip3o_jax, name) for name in blip3o_jax.__all__)
  with pytest.raises(AttributeError):
    blip3o_jax.no_such_name  # noqa: B018


def test_a_wheel_would_carry_configs_and_assets(tmp_path):
  words = ["egg_info", "--egg-base", str(tmp_path), "build", "--build-base", str(tmp_path / "base")]
  words += ["--build-lib", str(tmp_path / "lib")]
  subprocess.run([sys.executable, "setup.py", "-q", *words], cwd=ROOT, check=True, capture_output=True)
  built = tmp_path / "lib" / "blip3o_jax"
  for source, target in [(ROOT / "configs", built / "configs"), (PACKAGE, built)]:
    for file in source.rglob("*"):
      if file.is_file() and "__pycache__" not in file.parts:
        assert (target / file.relative_to(source)).is_file(), f"{file} would not be installed"


def test_licence_is_apache():
  text = (ROOT / "LICENSE").read_text()
  assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def cut(figure):
  """Two digits after the point, never rounded up."""
  return f"{math.floor(100 * figure) / 100:.2f}"


@pytest.mark.parametrize("file", sorted((PACKAGE / "benchmarks" / "record").glob("*.json")), ids=lambda file: file.stem)
def test_the_readme_says_what_the_record_says(file):
  record = json.loads(file.read_text())
  against = [
    other["ours_is_faster"]["median"] for case in record.get("cases", {}).values() for other in case["others"].values()
  ]
  if file.stem in ("checkpoint", "convert"):
    against = [case["seconds"]["median"] for case in record["cases"].values()]
  if file.stem == "train-step":
    ratios = [
      record["speedup"],
      record["speedup_two_passes"],
      *(o["ours_is_faster"] for o in record["others"].values()),
    ]
    against = [ratio[name] for ratio in ratios for name in ("median", "min", "max")]
    against += [peak / 2**30 for peak in record["peak_bytes"].values()]
  against += [curve["slope"] for curve in record.get("curves", {}).values()]
  command = f"bench {file.stem}" if f"bench {file.stem}" in README else f"... {file.stem}`"
  row = next(line for line in README.splitlines() if line.startswith("|") and command in line)
  assert [cut(figure) for figure in against if cut(figure) not in row] == []
