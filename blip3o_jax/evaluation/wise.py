"""WISE's folder (github.com/PKU-YuanGroup/WISE, arXiv 2503.07265).

  blip3o eval wise --model DIR --prompts WISE/data --out OUT

`--prompts` is one of the benchmark's files (cultural_common_sense.json, spatio-temporal_reasoning.json,
natural_science.json) or the folder of all three: rows with "prompt_id" and "Prompt". One picture a prompt, named by its
id. The scorer asks a language model on the net for marks of each picture, and makes the score (WiScore) of them:

  for set in cultural_common_sense spatio-temporal_reasoning natural_science; do
    python gpt_eval.py --json_path data/$set.json --image_dir OUT/images --output_dir RESULTS --api_key KEY \\
      --model gpt-4o-2024-05-13 --result_full $set-full.json --result_scores $set-scores.jsonl
  done
  python Calculate.py RESULTS/*-scores.jsonl --category all
"""

from collections.abc import Sequence
from pathlib import Path

from blip3o_jax.data.inputs import read_json
from blip3o_jax.errors import UserError

FILES = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")


class Prompts:
  """See jobs.generate.Prompts. images/ID.png."""

  nums = (1,)

  def __init__(self, path: str | Path):
    path = Path(path)
    files = [path / name for name in FILES] if path.is_dir() else [path]
    contents, self.digest = read_json(files)
    self.rows = [row for content in contents for row in content] if all(isinstance(c, list) for c in contents) else []
    ids = [row["prompt_id"] for row in self.rows if isinstance(row, dict) and type(row.get("prompt_id")) in (int, str)]
    if not ids or len(set(ids)) < len(self.rows):
      raise UserError(f'{path} is not of WISE: it wants lists of rows, each with its own "prompt_id"')

  def __len__(self) -> int:
    return len(self.rows)

  def request(self, index: int) -> dict:
    """The prompt alone: the explanation is for the judge."""
    prompt = self.rows[index].get("Prompt")
    if not isinstance(prompt, str) or not prompt.strip():
      raise UserError(f"WISE prompt {self.rows[index]['prompt_id']} is empty; fetch the file again")
    return {"prompt": prompt}

  def files(self, index: int, num: int) -> list[str]:
    """The scorer knows one picture a prompt."""
    return [f"images/{self.rows[index]['prompt_id']}.png"]

  def finish(self, index: int, out: Path, files: Sequence[str]) -> None:
    """Nothing more."""
