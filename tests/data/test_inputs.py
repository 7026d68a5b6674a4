import io
import json

import pytest
from PIL import Image

from blip3o_jax.data import tars
from blip3o_jax.data.inputs import describe
from blip3o_jax.errors import UserError


def test_describe_says_what_a_sample_holds(tmp_path):
  file = io.BytesIO()
  Image.new("RGB", (8, 6)).save(file, "PNG")
  tars.write(tmp_path / "a.tar", [("k.png", file.getvalue())])
  assert list(describe(tmp_path))[1:] == [f"  {tmp_path}/a.tar: k: 8 x 6"]  # no caption, no line
  tars.write(tmp_path / "a.tar", [("k.png", file.getvalue()), ("k.txt", b"a\ncircle")])
  assert list(describe(tmp_path))[1:] == [f"  {tmp_path}/a.tar: k: 8 x 6", "    a circle"]


def test_describe_says_what_is_said(tmp_path):
  path = tmp_path / "a.jsonl"
  messages = [{"from": "human", "value": "what\nis it?"}, {"from": "gpt", "value": "half a pair: \ud83d"}]
  path.write_text(json.dumps({"conversations": messages}))
  assert list(describe(path))[1:] == [f"  {path}: line 1: no picture", "    what is it?", "    half a pair: ?"]
  path.write_text(json.dumps({"conversations": [{"from": "human"}]}))
  with pytest.raises(UserError, match="a.jsonl: line 1: conversations must be human and gpt messages"):
    list(describe(path))
