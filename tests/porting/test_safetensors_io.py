"""Reading safetensors from files that may be hostile or broken, and writing them whole or not at all."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blip3o_jax.errors import UserError
from blip3o_jax.porting import safetensors_io

ARRAYS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b": np.arange(4).astype(ml_dtypes.bfloat16),
  "c": np.array(3.5, np.float32),
}


def test_write_is_read_by_us_and_by_the_library(tmp_path):
  file = tmp_path / "model.safetensors"
  safetensors_io.write(file, ARRAYS, ARRAYS.items(), {"format": "pt"})
  reader, theirs = safetensors_io.open_weights(file), load_file(file)
  assert list(reader) == sorted(ARRAYS) and [f.name for f in tmp_path.iterdir()] == [file.name]
  for key, array in ARRAYS.items():
    assert reader.shape(key) == array.shape and reader.dtype(key) == array.dtype
    np.testing.assert_array_equal(reader[key], array)
    np.testing.assert_array_equal(theirs[key].astype(np.float32), array.astype(np.float32))


def test_a_failed_write_leaves_the_old_file(tmp_path):
  file = tmp_path / "model.safetensors"
  safetensors_io.write(file, ARRAYS, ARRAYS.items())
  before = file.read_bytes()

  def breaks():
    yield "a", ARRAYS["a"]
    raise RuntimeError("power cut")

  with pytest.raises(RuntimeError):
    safetensors_io.write(file, ARRAYS, breaks())
  with pytest.raises(ValueError, match="announced"):
    safetensors_io.write(file, ARRAYS, [("a", ARRAYS["b"])])
  with pytest.raises(ValueError, match="not given"):
    safetensors_io.write(file, ARRAYS, [("a", ARRAYS["a"])])
  assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == [file.name]


def sharded(path, **changes):
  save_file({"a": ARRAYS["a"]}, path / "model-1.safetensors")
  save_file({"c": ARRAYS["c"]}, path / "model-2.safetensors")
  weight_map = {"a": "model-1.safetensors", "c": "model-2.safetensors"} | changes
  (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path):
  sharded(tmp_path)
  reader = safetensors_io.open_weights(tmp_path)
  np.testing.assert_array_equal(reader["a"], ARRAYS["a"])
  assert set(reader) == {"a", "c"}
  sharded(tmp_path, d="model-2.safetensors")
  with pytest.raises(UserError, match="d: expected in model-2.safetensors"):
    safetensors_io.open_weights(tmp_path)
  (tmp_path / "model.safetensors.index.json").unlink()
  assert set(safetensors_io.open_weights(tmp_path)) == {"a", "c"}
  save_file({"a": ARRAYS["a"]}, tmp_path / "model-3.safetensors")
  with pytest.raises(UserError, match="model-3.safetensors: a is also in model-1.safetensors"):
    safetensors_io.open_weights(tmp_path)


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", "x/../../y.safetensors", "..\\y", 7])
def test_an_index_cannot_point_outside(tmp_path, name):
  sharded(tmp_path, a=name)
  with pytest.raises(UserError, match="outside|not a safetensors index"):
    safetensors_io.open_weights(tmp_path)


@pytest.mark.parametrize(
  "content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}tail", b"\x10\0\0\0\0\0\0\0{}"], ids=repr
)
def test_broken_files(tmp_path, content):
  file = tmp_path / "model.safetensors"
  file.write_bytes(content)
  with pytest.raises(UserError, match="corrupt or truncated"):
    safetensors_io.open_weights(file)


def test_a_truncated_file(tmp_path):
  file = tmp_path / "model.safetensors"
  save_file({"a": np.zeros(100, np.float32)}, file)
  file.write_bytes(file.read_bytes()[:-8])
  with pytest.raises(UserError, match="corrupt or truncated"):
    safetensors_io.open_weights(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(tmp_path, name):
  (tmp_path / name).write_bytes(b"\x80\x04.")
  for path in (tmp_path, tmp_path / name):
    with pytest.raises(UserError, match="pickled weights.*refused"):
      safetensors_io.open_weights(path)


def test_all_that_is_wrong_with_an_index_is_told_at_once(tmp_path):
  sharded(tmp_path, e="model-3.safetensors", f="../x.safetensors")
  (tmp_path / "model-2.safetensors").write_bytes(b"no")
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(index.read_text().replace('"c":', '"a":'))
  with pytest.raises(UserError) as error:
    safetensors_io.open_weights(tmp_path)
  for text in (
    ", 4 problems:",
    "model.safetensors.index.json: a: is named twice",
    "names a file outside its directory ('../x.safetensors')",
    "model-2.safetensors: corrupt or truncated",
    "model-3.safetensors: no such file",
  ):
    assert text in str(error.value), text


def test_arrays_that_overlap_or_leave_a_gap_are_refused(tmp_path):
  file = tmp_path / "model.safetensors"
  safetensors_io.write(file, ARRAYS, ARRAYS.items())
  for old, new in ((b"[0,24]", b"[0,20]"), (b"[24,32]", b"[20,28]"), (b'"F32","shape":[2,3]', b'"F32","shape":[3,3]')):
    broken = tmp_path / "broken.safetensors"
    assert old in file.read_bytes()
    broken.write_bytes(file.read_bytes().replace(old, new))
    with pytest.raises(UserError, match="corrupt or truncated.*does not lie at"):
      safetensors_io.open_weights(broken)


def test_only_what_is_asked_for_is_read(tmp_path):
  safetensors_io.write(tmp_path / "m.safetensors", ARRAYS, ARRAYS.items())
  reader = safetensors_io.open_weights(tmp_path)
  assert [reader.shape(key) for key in reader] and reader.bytes_read == 0
  assert "b" in reader and reader.bytes_read == 0
  reader["b"]
  assert reader.bytes_read == 8


def test_nothing_there(tmp_path):
  with pytest.raises(UserError, match="no such file"):
    safetensors_io.open_weights(tmp_path / "x.safetensors")
  with pytest.raises(UserError, match="no .safetensors file"):
    safetensors_io.open_weights(tmp_path)
