import io
import json

import pytest
from PIL import Image

from blip3o_jax.data import tars
from blip3o_jax.data.inputs import PromptFile, describe
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


def test_a_line_that_is_no_prompt_is_told_by_its_number(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "a"}\n\n{\n' + "[" * 100_000)
  prompts = PromptFile(path)
  assert len(prompts) == 3 and prompts[0] == {"prompt": "a"}
  for i in (1, 2):
    with pytest.raises(UserError, match=f"line {i + 2} is not JSON"):
      prompts[i]
