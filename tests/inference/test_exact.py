"""What a picture depends on: its prompt, its seed, its number; not on the batch or the mesh it is drawn in."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax.errors import UserError
from blip3o_jax.inference.model import load_here

CHILD = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
import blip3o_jax
from blip3o_jax.inference import image
from blip3o_jax.inference.model import Model
from blip3o_jax.sharding import rules
from blip3o_jax.sharding.mesh import make_mesh

name, settings, sizes = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
prompts = ["a circle", "two red circles", "a green cross on a gray background", "a blue triangle left of a red circle",
  "three squares", "a purple circle and an orange square on a black background", "a yellow triangle", "a square"]
seeds = [3, 3, 1, 2, 0, 7, 3, 4]
latents, decode = [], Model._decode
Model._decode = lambda self, features, *rest: latents.append(np.asarray(features)) or decode(self, features, *rest)

def draw(mesh, batch_size):
  latents.clear()
  model = blip3o_jax.load(name, mesh=mesh)
  model.batch_size = batch_size
  pictures = model.generate(prompts, seed=seeds, **settings)
  return np.concatenate(latents), np.stack([row[0] for row in pictures]).astype(int)

def noise(mesh):
  keys = image.picture_keys(seeds, np.arange(8))
  keys = keys if mesh is None else jax.device_put(keys, rules.batch_sharding(mesh))
  return np.asarray(jax.jit(lambda keys: image.picture_noise(keys, 0, (8, 8, 96)))(keys))

meshes = {n: make_mesh({"data": n}, devices=jax.devices()[:n]) for n in sizes}
whole, pixels = draw(None, 8)
again = draw(None, 8)
alone = noise(None)
found = {"same": [bool((pixels == again[1]).all() and (whole == again[0]).all())]}
runs = {"1": lambda: draw(None, 1)} | {f"mesh {n}": lambda m=m: draw(m, 8) for n, m in meshes.items()}
cut = make_mesh({"slice": 2, "data": 1, "fsdp": 2}, devices=jax.devices()[:4])
runs["slice 2, fsdp 2"] = lambda: draw(cut, 8)
found["noise"] = [bool((noise(mesh) == alone).all()) for mesh in meshes.values()]
for run, call in runs.items():
  other, drawn = call()
  difference = np.abs(drawn - pixels)
  error = np.abs(other - whole).max() / np.abs(whole).max()
  found[run] = {"latents": float(error), "within_one": float((difference <= 1).mean()), "worst": int(difference.max())}
found["others"] = float(np.abs(whole[0] - whole[1]).max() / np.abs(whole).max())
print(json.dumps(found))
"""


def measure(model, settings, sizes):
  flags = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
  env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
  words = [sys.executable, "-c", CHILD, str(model), json.dumps(settings), json.dumps(sizes)]
  done = subprocess.run(words, capture_output=True, text=True, env=env)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  print(found)
  return found


def check(found):
  """Issue 6: noise to the bit, latents to 1e-3, pixels within one level on 99.9 %; the same program, the same bytes."""
  assert all(found.pop("same")) and all(found.pop("noise"))
  assert found.pop("others") > 0.01  # so that what follows could fail
  for run, seen in found.items():
    assert seen["latents"] < 1e-3 and seen["within_one"] >= 0.999, (run, seen)


@pytest.mark.slow
def test_eight_prompts_of_micro_on_two_four_and_eight_devices():
  """As `micro` draws, with a guided decoder besides."""
  check(measure("micro", {"steps": 10, "decoder_steps": 10, "decoder_guidance": 3.0}, [2, 4, 8]))


COMMANDS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from blip3o_jax import cli
model, out = sys.argv[1:]
model = ["--model", model, "--fsdp", "2"]
picture = f"{out}/000-0.png"
assert cli.main(["generate", *model, "--prompt", "a circle", "--num", "1", "--out", out]) == 0
assert cli.main(["edit", *model, "--image", picture, "--instruction", "a square", "--out", out]) == 0
assert cli.main(["reconstruct", *model, "--image", picture, "--out", out]) == 0
assert cli.main(["chat", *model, "--image", picture, "--prompt", "what is this?"]) == 0
from pathlib import Path
from blip3o_jax.apps.buttons import Buttons
from blip3o_jax.inference.model import load_here
*_, page = Buttons(load_here(sys.argv[1], fsdp=2), Path(out)).draw("a circle", 1, 0, 3.0, 2)
assert len(page["gallery"]) == 1
"""


@pytest.mark.slow
def test_commands_for_one_picture_use_all_devices(tiny_directory, tmp_path):
  """Weights cut over two of four, as a model needs that is too large for one; the same picture as on one device."""
  env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
  words = [sys.executable, "-c", COMMANDS, str(tiny_directory), str(tmp_path)]
  done = subprocess.run(words, capture_output=True, text=True, env=env)
  assert done.returncode == 0, done.stderr[-3000:]
  files = ["000-0.png", "000-0-edited.png", "000-0-reconstructed.png", "drawn/a-circle-1.png"]
  drawn = [np.asarray(Image.open(tmp_path / name)).astype(int) for name in files]
  model = blip3o_jax.load(tiny_directory)
  alone = [model.generate("a circle", seed=0)[0][0], model.edit(tmp_path / files[0], "a square", seed=0)[0]]
  alone += [model.reconstruct(tmp_path / files[0])[0], alone[0]]
  for here, there in zip(drawn, alone, strict=True):
    assert np.abs(here - there).max() <= 1


def test_more_devices_than_there_are(tiny_directory):
  with pytest.raises(UserError, match="does not fit"):
    load_here(tiny_directory, fsdp=64)


@pytest.fixture
def compiled():
  """Names of the programs that are compiled."""
  seen = []
  listen = lambda event, duration, **_: seen.append(event) if "backend_compile" in event else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)


def test_a_second_prompt_compiles_nothing(tiny_directory, compiled):
  """Prompts and questions of like length, other seeds, temperature, pieces; a far longer one is another program."""
  model = blip3o_jax.load(tiny_directory)
  model.batch_size = 2
  model.warm_up(num=2, prompt="a blue square")
  compiled.clear()
  model.generate("two blue squares", num=2, seed=9)
  model.generate(["a red circle", "a green cross"], seed=[1, 2])
  model.generate("a red circle", num=2, guidance=3)  # its own, 3.0, as a page or JSON may say it
  assert compiled == []
  model.chat("what is red?", max_new_tokens=5)
  compiled.clear()
  model.chat("is it a green circle?", max_new_tokens=5, temperature=0.5, seed=3)
  list(model.chat("what is blue?", max_new_tokens=5, stream=True))
  assert compiled == []
  model.chat("circle " * 100, max_new_tokens=5)
  assert compiled
