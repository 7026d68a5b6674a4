"""Names of models: bundled, directories, and the hub, whose part is played by a server on the loopback address."""

import dataclasses
import hashlib
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiny

from blip3o_jax.data.shapes_corpus import VOCABULARY, tokenizer_texts
from blip3o_jax.data.tokenizer import train_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.inference.model import load
from blip3o_jax.porting import model_dir
from blip3o_jax.porting.locate import convert_model, find, open_model

REPO, COMMIT = "Someone/Tiny-Release", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
  """The small model as a model directory, and in the release's layout."""
  folder = tmp_path_factory.mktemp("models")
  train_tokenizer(tokenizer_texts(), VOCABULARY).save(folder / "tokenizer")
  model_dir.write(
    folder / "here", preset="micro", overrides=tiny.OVERRIDES, params=tiny.params(), tokenizer_dir=folder / "tokenizer"
  )
  convert_model(folder / "here", folder / "release", format="safetensors")
  return folder


class Mirror(http.server.BaseHTTPRequestHandler):
  """As much of the hub as a download of a repository needs."""

  root, asked = None, []

  def do_HEAD(self):
    self._answer(body=False)

  def do_GET(self):
    self._answer(body=True)

  def _answer(self, body):
    files = {str(f.relative_to(self.root)): f for f in sorted(self.root.rglob("*")) if f.is_file()}
    path = self.path.partition("?")[0]
    if path.startswith(f"/api/models/{REPO}/tree/"):
      entry = lambda name: {"type": "file", "path": name, "size": files[name].stat().st_size, "oid": COMMIT}
      content, headers = json.dumps([entry(name) for name in files]).encode(), {}
    elif path.startswith(f"/api/models/{REPO}"):
      siblings = [{"rfilename": name} for name in files]
      content, headers = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode(), {}
    elif path.startswith(f"/{REPO}/resolve/") and (name := path.split("/", 5)[5]) in files:
      self.asked.append(name)
      content = files[name].read_bytes()
      headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
    else:
      self.send_error(404)
      return
    self.send_response(200)
    for key, value in ({"Content-Length": str(len(content))} | headers).items():
      self.send_header(key, value)
    self.end_headers()
    if body:
      self.wfile.write(content)

  def log_message(self, *_):
    pass


def test_a_hub_id_is_fetched_and_nothing_that_could_be_code(here, tmp_path):
  (here / "release" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  (here / "release" / "pipeline_llava_gen.py").write_text("raise SystemExit")
  (here / "release" / "safety_checker").mkdir()
  (here / "release" / "safety_checker" / "model.safetensors").write_bytes(b"not wanted")
  Mirror.root, Mirror.asked = here / "release", []
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  environment = os.environ | {
    "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
    "HF_HOME": str(tmp_path / "cache"),
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_OFFLINE": "0",
  }
  blip3o = [sys.executable, "-m", "blip3o_jax", "convert", "--to", tmp_path / "out", "--from"]
  try:
    done = subprocess.run([*blip3o, REPO], env=environment, capture_output=True, text=True)
    unknown = subprocess.run([*blip3o, "Someone/Else"], env=environment, capture_output=True, text=True)
  finally:
    server.shutdown()
    (here / "release" / "pytorch_model.bin").unlink()
    (here / "release" / "pipeline_llava_gen.py").unlink()
  assert done.returncode == 0, done.stderr
  assert not [name for name in Mirror.asked if name.endswith((".bin", ".py")) or "safety" in name]
  assert "model.safetensors" in Mirror.asked
  assert "diffusion-decoder/unet/diffusion_pytorch_model.safetensors" in Mirror.asked
  for name in ("dit", "unet", "backbone"):
    assert open_model(tmp_path / "out").content_hash(name) == open_model(here / "here").content_hash(name)
  assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1
  assert "Someone/Else: no such directory here, and the hub does not give it" in unknown.stderr


def test_a_release_draws_what_the_model_directory_draws(here):
  settings = {"num": 1, "seed": 3, "steps": 2, "decoder_steps": 2, "decoder_null": "zeros"}
  drawn = [load(here / place).generate("a red circle", **settings)[0][0] for place in ("here", "release")]
  assert drawn[0].std() > 0
  np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_what_diffusers_has_no_word_for_comes_back_too(here, tmp_path, part):
  """The miniature's position code and patches: a part written alone is read as what it was."""
  convert_model(here / "here", tmp_path / "part", format="safetensors", part=part)
  there, back = (getattr(open_model(place).config(), part) for place in (here / "here", tmp_path / "part"))
  assert back == dataclasses.replace(there, **({"tie_query_key_init": False} if part == "unet" else {}))
  open_model(tmp_path / "part").check()


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="no such model; give a directory with model.json"):
    find("absent")
  with pytest.raises(UserError, match="no such model"):
    find(tmp_path / "a" / "b")
  assert (find("micro") / "model.json").exists()


def test_what_was_left_out_is_told(here, tmp_path):
  lines = convert_model(here / "here", tmp_path / "out", format="safetensors")
  assert lines == ["left out, the release has no such part: text_tower", str(tmp_path / "out")]


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="would ask the network")
def test_a_bucket_without_its_package_is_told(here, tmp_path):
  with pytest.raises(UserError, match="gs://b/m.*needs gcsfs; pip install it"):
    convert_model("gs://b/m", tmp_path / "out")
  for format in (None, "safetensors"):
    with pytest.raises(UserError, match="gs://b/m.*needs gcsfs; pip install it"):
      convert_model(here / "here", "gs://b/m", format=format)
