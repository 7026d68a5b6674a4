import io
import json

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.benchmarks import data
from blip3o_jax.data import transforms


def test_both_sides_make_the_same_pixels(tmp_path):
  for file in data._render(tmp_path, 6):
    image = Image.open(file)
    assert image.format == "JPEG" and 640 <= max(image.size) <= 1024
    off = np.abs(data._plain(file).astype(int) - transforms.square(transforms.decode(file.read_bytes()), data.SIZE))
    assert off.max() <= 1 and (off > 0).mean() < 5e-4  # resizing what the crop keeps rounds a few otherwise
  assert len({data.picture(i) for i in range(4)}) == 4 and data.picture(1) == data.picture(1)
  assert Image.open(io.BytesIO(data.picture(2))).size != Image.open(io.BytesIO(data.picture(3))).size


@pytest.mark.slow
def test_the_bench(tmp_path):
  lines = list(data.run(tmp_path / "out.json", pictures=48, seconds=1.0, rounds=1))
  facts = json.loads((tmp_path / "out.json").read_text())
  assert [row["processes"] for row in facts["rows"]] == [1, 2] and lines[-1] == str(tmp_path / "out.json")
  assert len(facts["features"]) == 1 and facts["features"][0] > 10
  assert {"device", "cores", "jax", "versions", "date"} <= set(facts)
  assert all(row["plain"] > 1 and row["ours"] > 1 for row in facts["rows"])
