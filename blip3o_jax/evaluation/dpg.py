"""DPG-Bench's folder (github.com/TencentQQGYLab/ELLA, arXiv 2403.05135).

  blip3o eval dpg --model DIR --prompts ELLA/dpg_bench/prompts --out OUT

A text file for each of the 1,065 prompts. Four pictures a prompt, seed 42, on one sheet of two by two, which is what
the scorer cuts up (spec part 12). The scorer, in its own environment, from its own folder; RESOLUTION is the side of
one picture, 1024 for the release:

  bash dpg_bench/dist_eval.sh OUT/images RESOLUTION

It takes every file of OUT/images for a picture, and writes its results beside them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from blip3o_jax.data.outputs import encode_png, remove_stale, square_grid, write_atomically
from blip3o_jax.errors import UserError
from blip3o_jax.evaluation.shapes import read_picture


class Prompts:
  """See jobs.generate.Prompts. samples/ITEM-NUMBER.png, and images/ITEM.png of all of them."""

  nums = (4, 1)  # 1 with PIC_NUM=1 before the scorer's command

  def __init__(self, folder: str | Path):
    self.paths = sorted(Path(folder).glob("*.txt"))
    if not self.paths:
      raise UserError(f"{folder} holds no .txt prompts; give dpg_bench/prompts of the benchmark's repository")
    digest = hashlib.sha256()
    for path in self.paths:
      digest.update(path.name.encode() + path.read_bytes())
    self.digest = digest.hexdigest()

  def __len__(self) -> int:
    return len(self.paths)

  def request(self, index: int) -> dict:
    """The text of a file."""
    text = self.paths[index].read_text(errors="replace").strip()
    if not text:
      raise UserError(f"{self.paths[index]} is empty; fetch it again")
    return {"prompt": text}

  def files(self, index: int, num: int) -> list[str]:
    """Outside images/, where the scorer would take them for sheets."""
    return [f"samples/{self.paths[index].stem}-{n}.png" for n in range(num)]

  def finish(self, index: int, out: Path, files: Sequence[str]) -> None:
    """The sheet."""
    sheet = square_grid([read_picture(out / file) for file in files])
    path = out / "images" / f"{self.paths[index].stem}.png"
    remove_stale([path])  # the scorer would take it for a sheet
    write_atomically(path, encode_png(sheet))
