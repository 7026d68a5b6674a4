import numpy as np
import pytest

from blip3o_jax.data import outputs


def test_square_grid():
  sheet = outputs.square_grid([np.full((2, 3, 3), i, np.uint8) for i in range(5)])
  assert sheet.shape == (4, 9, 3) and sheet[3, 3, 0] == 4 and sheet[0, 8, 0] == 2 and sheet[3, 8, 0] == 255


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
  path = tmp_path / "new" / "a.txt"
  with pytest.raises(ZeroDivisionError):
    outputs.write_atomically(path, (b"%d" % (1 / i) for i in (1, 0)))
  assert list(path.parent.iterdir()) == []
  outputs.write_atomically(path, [b"a", b"b"])
  with pytest.raises(ZeroDivisionError):
    outputs.write_atomically(path, (b"%d" % (1 / i) for i in (1, 0)))
  assert path.read_bytes() == b"ab" and list(path.parent.iterdir()) == [path]
