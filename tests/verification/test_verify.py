"""`verify` on every recording: all within their bars, every array accounted for, and a wrong array is named."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from helpers import GOLDEN

from blip3o_jax import verification
from blip3o_jax.errors import CheckFailed, UserError
from blip3o_jax.verification import recording
from blip3o_jax.verification.recording import FORWARD, TRAJECTORY, Recording

FOLDERS = sorted(
  path.parent.name
  for path in GOLDEN.glob("*/fixture.json")
  if json.loads(path.read_text())["component"] in verification._MODULES
)


def test_there_are_recordings():
  assert {"next_dit", "next_dit_gqa", "next_dit_patch2", "eva_clip", "flow", "sdxl_decoder"} <= set(FOLDERS)
  assert {"qwen2_5_vl", "qwen2_5_vl_tied", "blip3o_generate", "blip3o_train_step"} <= set(FOLDERS)
  assert {"siglip", "sana_decoder"} <= set(FOLDERS)


# Of components with several recordings, or with tests of their own that replay the whole of it.
LONG = ("sdxl_decoder", "sana_decoder", "next_dit_gqa", "next_dit_patch2", "qwen2_5_vl_tied")


@pytest.mark.parametrize("folder", [pytest.param(x, marks=[pytest.mark.slow] * (x in LONG)) for x in FOLDERS])
def test_recording(folder, monkeypatch):
  calls = {}
  compare = Recording.compare

  def spy(self, name, ours, bar=FORWARD, valid=None):
    calls[name] = (np.asarray(ours), bar, valid)
    compare(self, name, ours, bar, valid)

  monkeypatch.setattr(Recording, "compare", spy)
  lines = verification.replay(GOLDEN / folder)
  assert [str(line) for line in lines if line.status == "miss"] == []
  rec = Recording(GOLDEN / folder)
  told = {line.name: line.status for line in lines}
  assert set(rec.names) <= set(told)
  compared = [name for name in rec.names if told[name] == "ok"]
  assert compared

  # Any one of the recorded arrays a little different: that one misses.
  for name in compared:
    array = rec._arrays[name]
    rec._arrays[name] = array + 2 if np.issubdtype(array.dtype, np.integer) else array * np.float32(1.01)
    compare(rec, name, *calls[name])
    assert (rec.lines[-1].name, rec.lines[-1].status) == (name, "miss")


@pytest.fixture
def small(tmp_path, monkeypatch):
  """`make(**arrays)` -> the directory of a recording whose component is a toy: 2 x, and sevens."""

  def check(rec):
    x = rec.input("x")
    rec.compare("y", 2 * x)
    rec.compare("whole", np.full(3, 7))
    rec.compare("picture", np.full(3, 7))
    rec.compare("late", 2 * x, TRAJECTORY, valid=x > 0)
    rec.skip("note", "said elsewhere")

  monkeypatch.setitem(verification._MODULES, "double", "double")
  module = type("double", (), {"check": staticmethod(check)})
  load = verification.importlib.import_module
  monkeypatch.setattr(
    verification.importlib, "import_module", lambda name: module if name.endswith(".double") else load(name)
  )

  def make(**arrays):
    (tmp_path / "fixture.json").write_text(json.dumps({"component": "double", "io": "io.npz"}))
    (tmp_path / "config.json").write_text("{}")
    np.savez(tmp_path / "io.npz", **arrays)
    return tmp_path

  return make


X = np.array([-1.0, 2.0, 3.0], np.float32)


def statuses(directory):
  return {line.name: line.status for line in verification.replay(directory)}


def test_what_can_become_of_an_array(small):
  found = statuses(small(x=X, y=2 * X, note=X))
  assert found == {
    "x": "input",
    "y": "ok",
    "note": "not compared",
    **dict.fromkeys(("whole", "picture", "late"), "not recorded"),
  }
  assert statuses(small(x=X, y=2 * X, stranger=X))["stranger"] == "miss"
  assert statuses(small(x=X))["(recording)"] == "miss"


@pytest.mark.parametrize(
  ("arrays", "status"),
  [
    ({"y": 2 * X * np.float32(1 + 0.9e-4)}, "ok"),
    ({"y": 2 * X * np.float32(1 + 1.1e-4)}, "miss"),
    ({"y": 2 * X[:2]}, "miss"),
    ({"y": 2 * X[None]}, "miss"),
    ({"y": np.array([-2, 4, np.nan], np.float32)}, "miss"),
    ({"whole": np.array([7, 7, 7], np.int32)}, "ok"),
    ({"whole": np.array([7, 7, 8], np.int32)}, "miss"),
    ({"picture": np.array([6, 7, 8], np.uint8)}, "ok"),
    ({"picture": np.array([5, 7, 8], np.uint8)}, "miss"),
    ({"late": np.array([99, 4, 6], np.float32)}, "ok"),  # the first place does not count
    ({"late": np.array([-2, 4.008, 6], np.float32)}, "miss"),
  ],
)
def test_error_measure(small, arrays, status):
  (name,) = arrays
  assert statuses(small(x=X, **arrays))[name] == status


def test_nothing_valid_is_a_miss(small):
  assert statuses(small(x=-np.abs(X), late=X))["late"] == "miss"


def test_the_error_is_relative_to_the_largest_recorded_number(small):
  lines = {line.name: line for line in verification.replay(small(x=X, y=2 * X + np.float32(6e-3)))}
  np.testing.assert_allclose(lines["y"].error, 6e-3 / 6.006, rtol=1e-3)


def test_absent_input_is_an_input_error(small):
  with pytest.raises(UserError, match="input 'x' is not in io.npz"):
    verification.verify([small(y=X)])


def test_a_recording_changed_by_one_percent_fails_and_is_named(tmp_path, capsys):
  """The whole way, on a copy of a real one: 1 % on one array, and an array that nobody knows."""
  copy = tmp_path / "eva_clip"
  shutil.copytree(GOLDEN / "eva_clip", copy)
  with np.load(copy / "io.npz") as stored:
    arrays = dict(stored)
  arrays["pooled"] = arrays["pooled"] * np.float32(1.01)
  np.savez(copy / "io.npz", **arrays, unheard_of=np.zeros(2, np.float32))
  with pytest.raises(CheckFailed) as failure:
    verification.verify([copy], as_json=True)
  assert "2 missed" in str(failure.value) and "pooled" in str(failure.value) and "unheard_of" in str(failure.value)
  report = json.loads(capsys.readouterr().out)
  status = {entry["name"]: entry["status"] for entry in report["recordings"][0]["arrays"]}
  assert not report["ok"]
  assert [name for name, s in status.items() if s == "miss"] == ["pooled", "unheard_of"]


def test_lines(small, capsys):
  verification.verify([small(x=X, y=2 * X)])
  out = capsys.readouterr().out
  assert "error  0.0e+00  bar   1e-04" in out and out.rstrip().endswith("all within their bars")


def test_bad_recordings(tmp_path, small):
  with pytest.raises(UserError, match="no recording given"):
    verification.verify([])
  with pytest.raises(UserError, match=r"fixture.json: No such file"):
    verification.verify([tmp_path / "absent"])
  directory = small(x=X)
  (directory / "io.npz").write_bytes(b"PK\x03\x04 broken")
  with pytest.raises(UserError, match="io.npz: cannot be read"):
    verification.verify([directory])
  small(x=np.array([1, np.inf], np.float32))
  with pytest.raises(UserError, match="not finite"):
    verification.verify([directory])
  np.savez(directory / "io.npz", x=np.array([{"a": 1}], object))
  with pytest.raises(UserError, match="io.npz: cannot be read"):
    verification.verify([directory])
  (directory / "io.npz").unlink()
  with pytest.raises(UserError, match="no such file"):
    verification.verify([directory])
  (directory / "fixture.json").write_text('{"component": "heart", "io": "io.npz"}')
  np.savez(directory / "io.npz", x=X)
  with pytest.raises(UserError, match="'heart' is not supported yet"):
    verification.verify([directory])
  (directory / "fixture.json").write_text("[]")
  with pytest.raises(UserError, match="expected a JSON object"):
    verification.verify([directory])


def test_one_that_cannot_be_replayed_does_not_hide_the_others(tmp_path, small, capsys):
  good, absent = small(x=X, y=2 * X), tmp_path / "absent"
  with pytest.raises(UserError, match="absent"):
    verification.verify([absent, good])
  out = capsys.readouterr().out
  assert "absent" in out and "error  0.0e+00" in out and "all within" not in out
  with pytest.raises(UserError, match="absent"):
    verification.verify([good, absent], as_json=True)
  report = json.loads(capsys.readouterr().out)
  assert not report["ok"]
  first, second = report["recordings"]
  assert [entry["status"] for entry in first["arrays"]][:2] == ["input", "ok"] and "error" not in first
  assert second["arrays"] == [] and "No such file" in second["error"]


def test_floats_go_in_as_float32(small):
  """Whatever they are stored as: nothing else is replayed."""
  rec = Recording(small(x=X.astype(np.float64), half=X.astype(np.float16), ids=np.arange(3)))
  assert [rec.input(name).dtype for name in ("x", "half", "ids")] == [np.float32, np.float32, np.int64]


@pytest.mark.slow
def test_several_pictures_of_one_condition(tmp_path):
  """Each condition with two starts, as num_images_per_prompt = 2 records them (spec 3.3)."""
  copy = tmp_path / "flow"
  shutil.copytree(GOLDEN / "flow", copy)
  with np.load(copy / "io.npz") as stored:
    arrays = dict(stored)
  for name in arrays:
    if name.startswith("sample_") and arrays[name].ndim == 4:
      arrays[name] = arrays[name].repeat(2, axis=0)
  np.savez(copy / "io.npz", **arrays)
  assert not [str(line) for line in verification.replay(copy) if line.status == "miss"]
  arrays["sample_init_noise"] = arrays["sample_init_noise"][:-1]
  np.savez(copy / "io.npz", **arrays)
  with pytest.raises(UserError, match="cannot share"):
    verification.replay(copy)


@pytest.mark.parametrize("named", [True, False])
def test_weights_in_shards(tmp_path, named):
  """As save_pretrained leaves a large model, whether fixture.json names a file or not."""
  copy = tmp_path / "llama"
  shutil.copytree(GOLDEN / "llama", copy)
  fixture = json.loads((copy / "fixture.json").read_text())
  whole = safetensors.numpy.load_file(copy / fixture["weights"])
  (copy / fixture["weights"]).unlink()
  names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(sorted(whole))}
  for shard in set(names.values()):
    safetensors.numpy.save_file({k: v for k, v in whole.items() if names[k] == shard}, copy / shard)
  (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
  if not named:
    del fixture["weights"]
    (copy / "fixture.json").write_text(json.dumps(fixture))
  assert not [str(line) for line in verification.replay(copy) if line.status == "miss"]


def test_an_incomplete_config_is_an_input_error(tmp_path):
  copy = tmp_path / "eva_clip"
  shutil.copytree(GOLDEN / "eva_clip", copy)
  config = json.loads((copy / "config.json").read_text())
  del config["vision_cfg"]["head_width"]
  (copy / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="head_width"):
    verification.verify([copy])


def test_bars():
  assert (recording.FORWARD, recording.TRAJECTORY) == (1e-4, 1e-3)
