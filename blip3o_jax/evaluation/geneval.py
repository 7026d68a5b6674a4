"""GenEval's folder (github.com/djghosh13/geneval, arXiv 2310.11513).

  blip3o eval geneval --model DIR --prompts evaluation_metadata.jsonl --out OUT

`evaluation_metadata.jsonl` is the repository's own file of 553 prompts (its `prompts/`), or the release's
`geneval_prompt.jsonl`. Four pictures a prompt, seed 42, as the release's script (spec part 12). The scorer, in its own
environment, from its own folder:

  python evaluation/evaluate_images.py OUT/images --outfile results.jsonl --model-path DETECTORS
  python evaluation/summary_scores.py results.jsonl
"""

import json
from collections.abc import Sequence
from pathlib import Path

from blip3o_jax.data.inputs import PromptFile
from blip3o_jax.data.outputs import encode_png, remove_stale, square_grid, write_atomically
from blip3o_jax.evaluation.shapes import read_picture


class Prompts(PromptFile):
  """See jobs.generate.Prompts. Each row has its folder: samples/, metadata.jsonl (one object) and grid.png."""

  nums = None

  def request(self, index: int) -> dict:
    """The prompt itself; `detailed_caption` of the release's file is not used there either."""
    return {"prompt": self[index]["prompt"]}

  def files(self, index: int, num: int) -> list[str]:
    """images/00012/samples/00000.png and so on."""
    return [f"images/{index:05d}/samples/{n:05d}.png" for n in range(num)]

  def finish(self, index: int, out: Path, files: Sequence[str]) -> None:
    """The row as it came, and the pictures on one sheet."""
    folder = out / f"images/{index:05d}"
    metadata, grid = folder / "metadata.jsonl", folder / "grid.png"
    remove_stale([metadata, grid])
    write_atomically(metadata, json.dumps(self[index]).encode())
    write_atomically(grid, encode_png(square_grid([read_picture(out / file) for file in files])))
