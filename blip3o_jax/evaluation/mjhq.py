"""MJHQ-30K's folder (huggingface.co/datasets/playgroundai/MJHQ-30K, arXiv 2402.17245).

  blip3o eval mjhq --model DIR --prompts meta_data.json --out OUT

`meta_data.json` says for every id its "category" and "prompt": 30,000 in ten categories. One picture each, in the
folder of its category, as the dataset's own pictures lie (mjhq30k_imgs.zip). The score is the Frechet distance of both
folders by the clean-fid package, overall and for each category:

  python -c "from cleanfid import fid; print(fid.compute_fid('OUT/images', 'mjhq30k_imgs'))"
"""

from collections.abc import Sequence
from pathlib import Path

from blip3o_jax.data.inputs import read_json
from blip3o_jax.errors import UserError


class Prompts:
  """See jobs.generate.Prompts. images/CATEGORY/ID.png."""

  nums = (1,)

  def __init__(self, path: str | Path):
    (content,), self.digest = read_json([Path(path)])
    if not isinstance(content, dict) or not content:
      raise UserError(f"{path} is not of MJHQ-30K: it wants an object of ids")
    self.ids, self.rows = list(content), list(content.values())

  def __len__(self) -> int:
    return len(self.ids)

  def request(self, index: int) -> dict:
    """The prompt of an id."""
    row = self.rows[index]
    if not all(isinstance(row, dict) and isinstance(row.get(key), str) and row[key] for key in ("category", "prompt")):
      raise UserError(f'MJHQ-30K entry {self.ids[index]} lacks a "category" or a "prompt"; fetch the file again')
    return {"prompt": row["prompt"]}

  def files(self, index: int, num: int) -> list[str]:
    """The dataset has one picture an id."""
    return [f"images/{self.rows[index]['category']}/{self.ids[index]}.png"]

  def finish(self, index: int, out: Path, files: Sequence[str]) -> None:
    """Nothing more."""
