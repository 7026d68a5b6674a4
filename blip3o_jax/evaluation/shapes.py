"""`eval shapes`: does a model draw what held-out prompts say? Judged from pixels alone (DESIGN part 4).

Leaves OUT/scores.json, OUT/grid.png (everything drawn, framed by the judge's verdict) and
OUT/pictures/PROMPT-NUMBER.png, in a folder that is marked, as those of an earlier evaluation are removed.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip3o_jax.data import shapes, transforms
from blip3o_jax.data.outputs import encode_png, remove_stale, writable_folder, write_atomically
from blip3o_jax.data.shapes import FAMILIES, INVERSE, Caption
from blip3o_jax.errors import UserError
from blip3o_jax.evaluation.shapes_judge import judge, satisfies
from blip3o_jax.inference.model import load_here

Question = tuple[np.ndarray | None, str, str]  # picture uint8 [H, W, 3] or None, question, answer

SPLITS = ("heldout", "seen")
_KINDS = {  # how a question begins -> what it asks; the first that fits
  "what colour is the background": "background",
  "what colour": "colour",
  "which shape": "shape",
  "how many": "count",
  "is there": "presence",
  "is the": "relation",
  "what is": "neighbour",
  "where is": "place",
}


@dataclasses.dataclass(frozen=True)
class ShapesScore:
  """Shares of right pictures, 0..1.

  Attributes:
    overall: mean of the family means, as GenEval counts.
    standard_error: of `overall`. The unit is the prompt, as pictures of one prompt go right and wrong together.
    families: mean over the prompts of each family.
    control: `overall` of the same pictures, each judged against another prompt of its family: what chance would get.
    control_families: the same for each family.
    pictures: how many were judged.
    understanding: share of questions answered word for word, {set: {"overall" or kind of question: share}}.
  """

  overall: float
  standard_error: float
  families: Mapping[str, float]
  control: float
  control_families: Mapping[str, float]
  pictures: int
  understanding: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


def run(
  model_dir: str | Path,
  out_dir: str | Path,
  *,
  split: str = "heldout",
  num: int = 4,
  seed: int = 0,
  questions_dir: str | Path | None = None,
  limit: int | None = None,
  fsdp: int = 1,
  compile_cache: str | Path | None = None,
) -> ShapesScore:
  """Draw `num` pictures for every prompt of a split, judge them, and write all of it to `out_dir`.

  Args:
    model_dir, fsdp: see inference.model.load_here.
    split: "heldout" (combinations held out of every stage) or "seen".
    questions_dir: `understanding/` of a shapes corpus; its held-out questions are asked too.
    limit: number of prompts, taken from the families in turn.

  Raises:
    UserError: unknown split, `out_dir` cannot be written or holds another command's pictures, no model, or no questions
      there.
  """
  if split not in SPLITS:
    raise UserError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
  if num < 1 or (limit is not None and limit < 1):
    raise UserError(f"num is {num} and limit is {limit}; both must be at least 1")
  out = writable_folder(out_dir)
  model = load_here(model_dir, fsdp=fsdp, compile_cache=compile_cache)
  return evaluate(model, prompts(split, limit), out, num=num, seed=seed, questions_dir=questions_dir, split=split)


def prompts(split: str = "heldout", limit: int | None = None) -> list[Caption]:
  """The prompts of a split, grouped by family; `limit` takes from the families in turn."""
  every = shapes.heldout_prompts() if split == "heldout" else shapes.seen_prompts()
  if limit is not None:
    rank = {family: 0 for family in FAMILIES}
    turns = []
    for caption in every:
      turns.append((rank[caption.family], FAMILIES.index(caption.family), caption))
      rank[caption.family] += 1
    every = [caption for *_, caption in sorted(turns, key=lambda turn: turn[:2])[:limit]]
  return sorted(every, key=lambda caption: FAMILIES.index(caption.family))


def evaluate(
  model: Any,
  captions: Sequence[Caption],
  out_dir: str | Path,
  *,
  num: int = 4,
  seed: int = 0,
  questions_dir: str | Path | None = None,
  split: str = "heldout",
) -> ShapesScore:
  """What `run` does, for an open model: anything with the `generate` and `answer` of `inference.model.Model`."""
  out = Path(out_dir)
  questions = read_heldout(questions_dir) if questions_dir else {}
  _mark(out / "pictures")
  # Of an earlier evaluation: written last, it says that the rest is whole.
  (out / "scores.json").unlink(missing_ok=True)
  drawn = model.generate([caption.text for caption in captions], num=num, seed=seed)
  result, verdicts = score(captions, drawn)
  result = dataclasses.replace(result, understanding=ask(model, questions))
  _write_pictures(out / "pictures", drawn)
  write_atomically(out / "grid.png", encode_png(grid([c.text for c in captions], drawn, verdicts)))
  rows = [{"prompt": c.text, "spec": c.spec, "right": right} for c, right in zip(captions, verdicts, strict=True)]
  written = {"split": split, "num": num, "seed": seed, **dataclasses.asdict(result), "prompts": rows}
  write_atomically(out / "scores.json", (json.dumps(written, indent=2) + "\n").encode())
  return result


def read_score(path: str | Path) -> ShapesScore:
  """The score in a scores.json."""
  stored = json.loads(Path(path).read_text())
  return ShapesScore(**{field.name: stored[field.name] for field in dataclasses.fields(ShapesScore)})


def score(captions: Sequence[Caption], drawn: Sequence[Sequence[np.ndarray]]) -> tuple[ShapesScore, list[list[bool]]]:
  """Judge pictures uint8 [64, 64, 3], drawn[i] for captions[i]; returns the score and the verdict on each picture."""
  seen = [[judge(picture) for picture in row] for row in drawn]
  verdicts = [[bool(satisfies(s, c.spec)) for s in row] for c, row in zip(captions, seen, strict=True)]
  partners = control_partners(captions)
  shuffled = [
    (captions[i], [bool(satisfies(s, captions[j].spec)) for s in seen[i]])
    for i, j in enumerate(partners)
    if j is not None
  ]
  families, error = _means(zip(captions, verdicts, strict=True))
  control_families, _ = _means(shuffled)
  mean = lambda table: float(np.mean(list(table.values()))) if table else 0.0
  pictures = sum(map(len, drawn))
  return ShapesScore(mean(families), error, families, mean(control_families), control_families, pictures), verdicts


def _means(rows) -> tuple[dict[str, float], float]:
  """Mean of each family over its prompts, and the standard error of the mean of families."""
  by_family: dict[str, list[float]] = {}
  for caption, right in rows:
    by_family.setdefault(caption.family, []).append(float(np.mean(right)))
  variance = sum(np.var(r, ddof=1) / len(r) for r in by_family.values() if len(r) > 1)
  means = {family: float(np.mean(by_family[family])) for family in FAMILIES if family in by_family}
  return means, float(np.sqrt(variance) / max(len(means), 1))


def control_partners(captions: Sequence[Caption]) -> list[int | None]:
  """For each prompt the index of another of its family (of any, if there is none) that claims something else.

  A fixed random cycle within the family, so that the control keeps the family's own difficulty.
  """
  order = np.random.default_rng(0).permutation(len(captions)).tolist()
  partners: list[int | None] = [None] * len(captions)
  for place, i in enumerate(order):
    later = [j for j in order[place + 1 :] + order[:place] if _claim(captions[j]) != _claim(captions[i])]
    related = [j for j in later if captions[j].family == captions[i].family]
    partners[i] = next(iter(related + later), None)
  return partners


def _claim(caption: Caption) -> tuple:
  """Equal for captions that say the same in another order ("a left of b", "b right of a")."""
  things, relation = caption.things, caption.relation
  if relation in ("right of", "below"):
    things, relation = things[::-1], INVERSE[relation]
  return things if relation else tuple(sorted(things, key=str)), relation, caption.ground


# ---- questions


def ask(model: Any, sets: Mapping[str, Sequence[Question]]) -> dict[str, dict[str, float]]:
  """Ask every question once, greedily; see `ShapesScore.understanding`."""
  found = {}
  for name, rows in sets.items():
    said = model.answer([picture for picture, *_ in rows], [question for _, question, _ in rows])
    right: dict[str, list[bool]] = {}
    for (_, question, truth), answer in zip(rows, said, strict=True):
      right.setdefault(kind_of(question), []).append(same_answer(answer, truth))
    everything = [r for kind in right.values() for r in kind]
    found[name] = {"overall": float(np.mean(everything))} | {k: float(np.mean(right[k])) for k in sorted(right)}
  return found


def read_heldout(questions_dir: str | Path) -> dict[str, list[Question]]:
  """The held-out questions of a corpus, by name of their set. Raises UserError where there are none."""
  sets = {path.stem: read_questions(path) for path in sorted(Path(questions_dir).glob("heldout*.jsonl"))}
  if not sets or not all(sets.values()):
    raise UserError(f"no held-out questions in {questions_dir}; give understanding/ of a corpus of data make-shapes")
  return sets


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
  """The first turn of every row of a questions file.

  Raises:
    UserError: a line that is no such row.
  """
  path, found = Path(path), []
  for number, line in enumerate(path.read_text().splitlines()[:limit], start=1):
    try:
      row = json.loads(line)
      question, answer = (turn["value"] for turn in row["conversations"][:2])
      picture = read_picture(path.parent / row["image"]) if row["image"] else None
      found.append((picture, question.removeprefix("<image>\n"), answer))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      what = f"{type(error).__name__}: {error}"
      raise UserError(f"{path}: line {number} is no question ({what}); make the corpus again") from None
  return found


def kind_of(question: str) -> str:
  """What a question asks for: "colour", "count", ..."""
  return next((kind for start, kind in _KINDS.items() if question.startswith(start)), "other")


def same_answer(answer: str, truth: str) -> bool:
  """Word for word, but for case, outer blanks and a final full stop."""
  plain = lambda text: text.strip().rstrip(".").lower()
  return plain(answer) == plain(truth)


# ---- pictures of pictures, and files


def grid(
  labels: Sequence[str],
  drawn: Sequence[Sequence[np.ndarray]],
  verdicts: Sequence[Sequence[bool]] | None = None,
  *,
  columns: int = 3,
  zoom: int = 2,
) -> np.ndarray:
  """A sheet of blocks, each a label over its pictures, framed green where right, red where wrong; uint8 [H, W, 3]."""
  gap, frame, head = 10, 3, 22
  height, width = (zoom * side for side in drawn[0][0].shape[:2])
  columns = min(columns, len(drawn))
  block_w = max(map(len, drawn)) * (width + 2 * frame + gap) + 2 * gap
  block_h = head + height + 2 * frame + 2 * gap
  rows = -(-len(drawn) // columns)
  sheet = Image.new("RGB", (columns * block_w + gap, rows * block_h + gap), (255, 255, 255))
  pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
  for i, (label, pictures) in enumerate(zip(labels, drawn, strict=True)):
    # Down the columns, so that a family stays together.
    left, top = gap + i // rows * block_w, gap + i % rows * block_h
    pen.text((left, top), label, fill=(40, 43, 48), font=font)
    for n, picture in enumerate(pictures):
      x, y = left + n * (width + 2 * frame + gap), top + head
      colour = (200, 200, 200) if verdicts is None else (44, 147, 80) if verdicts[i][n] else (207, 75, 67)
      pen.rectangle((x, y, x + width + 2 * frame - 1, y + height + 2 * frame - 1), fill=colour)
      sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x + frame, y + frame))
  return np.asarray(sheet)


def read_picture(path: str | Path) -> np.ndarray:
  """An image file as uint8 [H, W, 3]. Raises UserError naming it, if it cannot be read."""
  return np.asarray(transforms.open_picture(path))


def _mark(folder: Path) -> None:
  """Say that the pictures in a folder are an evaluation's. Raises UserError where another command's lie there."""
  mark = folder / ".eval-shapes"
  if not mark.exists() and any(map(_is_ours, folder.glob("*.png"))):
    raise UserError(f"{folder} holds pictures of another command, which would be written over; give another --out")
  write_atomically(mark, b"")


def _is_ours(file: Path) -> bool:
  return bool(re.fullmatch(r"\d{3,}-\d+\.png", file.name))


def _write_pictures(folder: Path, drawn: Sequence[Sequence[np.ndarray]]) -> None:
  for file in filter(_is_ours, folder.glob("*.png")):  # of an evaluation with other prompts; what else lies there stays
    file.unlink()
  pictures = {folder / f"{i:03d}-{n}.png": picture for i, row in enumerate(drawn) for n, picture in enumerate(row)}
  remove_stale(pictures)
  for path, picture in pictures.items():
    write_atomically(path, encode_png(picture))
