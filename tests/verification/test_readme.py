"""The README's way to record a fine-tune, run as it stands there."""

import re
from pathlib import Path

import pytest

from blip3o_jax import verification

README = Path(__file__).resolve().parents[2] / "README.md"


def test_a_recording_made_as_the_readme_says_verifies(tmp_path, monkeypatch, capsys):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  config = transformers.Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
  )
  block = next(b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "save_pretrained" in b)
  monkeypatch.chdir(tmp_path)
  exec(block, {"model": transformers.Qwen3ForCausalLM(config)})
  verification.verify([tmp_path / "recording"])
  assert "all within their bars" in capsys.readouterr().out
