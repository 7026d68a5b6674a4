"""One self-contained HTML page about a run: scores, pictures, answers, curves. It asks the network for nothing."""

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from blip3o_jax.apps.plots import Curve, loss_svg
from blip3o_jax.data.outputs import encode_png, write_atomically
from blip3o_jax.evaluation.shapes import FAMILIES, ShapesScore, same_answer


@dataclasses.dataclass(frozen=True)
class Drawing:
  """Pictures [n] of one prompt, uint8 [S, S, 3], with the judge's verdict on each (None: not judged)."""

  prompt: str
  pictures: Sequence[np.ndarray]
  verdicts: Sequence[bool | None] = ()
  family: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
  """A question about a picture, what the model said, and the truth."""

  image: np.ndarray
  question: str
  answer: str
  truth: str


@dataclasses.dataclass(frozen=True)
class Report:
  """What the page tells. Anything left empty has no section."""

  title: str
  summary: str
  facts: Sequence[tuple[str, str]] = ()  # (value, what it is): the large numbers at the top
  scores: Mapping[str, ShapesScore] = dataclasses.field(default_factory=dict)  # first the run's own
  drawings: Sequence[Drawing] = ()
  drawings_note: str = ""
  seeds: Sequence[Drawing] = ()  # one entry a seed, all of one prompt
  reconstructions: Sequence[tuple[np.ndarray, np.ndarray]] = ()
  answers: Sequence[Answer] = ()
  answers_note: str = ""
  curves: Sequence[Curve] = ()
  steps: Sequence[tuple[str, str, float]] = ()  # (name, note, seconds)
  commands: Sequence[tuple[str, str]] = ()  # (what it does, command)
  machine: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write(path: str | Path, report: Report) -> None:
  """Write the page to `path`, atomically."""
  write_atomically(path, render(report).encode())


def clock(seconds: float) -> str:
  """ "0.4 s", "42 s", "9 min 12 s", "1 h 05 min"."""
  if seconds < 10:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
  return f"{minutes // 60} h {minutes % 60:02} min"


def render(report: Report) -> str:
  """The whole page as text."""
  facts = "".join(f"<div><b>{_text(value)}</b><span>{_text(what)}</span></div>" for value, what in report.facts)
  sections = [
    ("Score", "by prompt family, on prompts held out of every stage of training", _scores(report.scores)),
    ("Pictures", report.drawings_note, _drawings(report.drawings)),
    ("One prompt, two seeds", "same words, different noise", _seeds(report.seeds)),
    ("Through CLIP and back", "above the picture, below what the decoder makes of its CLIP features alone",
     _reconstructions(report.reconstructions)),
    ("Questions and answers", report.answers_note, _answers(report.answers)),
    ("Losses", "every logged step (faint) and its course", _curves(report.curves)),
    ("Where the time went", "", _steps(report.steps)),
    ("Try next", "", _commands(report.commands)),
    ("Machine", "", _machine(report.machine)),
  ]  # fmt: skip
  body = "".join(
    f"<section><h2>{_text(title)}</h2>{f'<p class=note>{_text(note)}</p>' if note else ''}{content}</section>"
    for title, note, content in sections
    if content
  )
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f'<title>{_text(report.title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><main>'
    f"<header><p class=eyebrow>blip3o_jax</p><h1>{_text(report.title)}</h1><p class=lead>{_text(report.summary)}</p>"
    f"{f'<div class=facts>{facts}</div>' if facts else ''}</header>{body}</main></body></html>\n"
  )


def _text(value: str) -> str:
  return html.escape(str(value))


def _image(picture: np.ndarray, label: str, kind: str = "") -> str:
  data = base64.b64encode(encode_png(picture)).decode()
  return f'<img class="{kind}" alt="{_text(label)}" src="data:image/png;base64,{data}">'


def _scores(scores: Mapping[str, ShapesScore]) -> str:
  if not scores:
    return ""
  own = next(iter(scores.values()))
  series = [(name, s.families, s.overall, s.standard_error) for name, s in scores.items()]
  series.append(("control: the same pictures, other prompts", own.control_families, own.control, None))
  legend = "".join(f'<span><i class="s{n}"></i>{_text(name)}</span>' for n, (name, *_) in enumerate(series))
  rows = []
  for family in ("overall", *FAMILIES):
    bars = ""
    for n, (_, families, overall, error) in enumerate(series):
      value = overall if family == "overall" else families.get(family)
      if value is None:
        continue
      words = f"{100 * value:.0f} %" + (f" ± {100 * error:.0f}" if family == "overall" and error is not None else "")
      bars += f'<div class="bar"><i class="s{n}" style="width:{100 * value:.1f}%"></i><span>{words}</span></div>'
    rows.append(
      f'<div class="row{" total" if family == "overall" else ""}"><b>{_name(family)}</b><div>{bars}</div></div>'
    )
  return f'<div class="legend">{legend}</div><div class="scores">{"".join(rows)}</div>'


def _name(family: str) -> str:
  return _text({"color_attr": "colour of each", "colors": "colours"}.get(family, family.replace("_", " ")))


def _drawing(drawing: Drawing, caption: str) -> str:
  verdicts = [*drawing.verdicts, *[None] * len(drawing.pictures)]
  kinds = {True: "right", False: "wrong", None: ""}
  pictures = "".join(
    f"<span>{_image(picture, drawing.prompt, kinds[verdict])}{_mark(verdict)}</span>"
    for picture, verdict in zip(drawing.pictures, verdicts, strict=False)
  )
  return f'<figure><div class="strip">{pictures}</div><figcaption>{caption}</figcaption></figure>'


def _mark(verdict: bool | None) -> str:
  if verdict is None:
    return ""
  return '<em class="right" title="right">✓</em>' if verdict else '<em class="wrong" title="wrong">✗</em>'


def _drawings(drawings: Sequence[Drawing]) -> str:
  families = dict.fromkeys(d.family for d in drawings)
  parts = []
  for family in families:
    cards = "".join(_drawing(d, _text(d.prompt)) for d in drawings if d.family == family)
    parts.append(f'{f"<h3>{_name(family)}</h3>" if family else ""}<div class="cards">{cards}</div>')
  return "".join(parts)


def _seeds(seeds: Sequence[Drawing]) -> str:
  if not seeds:
    return ""
  cards = "".join(_drawing(d, f"seed {n}") for n, d in enumerate(seeds))
  return f'<p class="prompt">“{_text(seeds[0].prompt)}”</p><div class="cards large">{cards}</div>'


def _reconstructions(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
  cells = "".join(f"<div>{_image(a, 'picture')}{_image(b, 'reconstruction')}</div>" for a, b in pairs)
  return f'<div class="pairs">{cells}</div>' if cells else ""


def _answers(answers: Sequence[Answer]) -> str:
  if not answers:
    return ""
  cards = ""
  for a in answers:
    right = same_answer(a.answer, a.truth)
    truth = "" if right else f"<small>it is {_text(a.truth)}</small>"
    cards += (
      f'<div class="answer">{_image(a.image, a.question)}<div><p>{_text(a.question)}</p>'
      f'<p class="said {"right" if right else "wrong"}">{_text(a.answer) or "(nothing)"}</p>{truth}</div></div>'
    )
  return f'<div class="cards">{cards}</div>'


def _curves(curves: Sequence[Curve]) -> str:
  cards = "".join(
    f"<figure><figcaption><b>{_text(c.name)}</b> {c.losses[-1]:.3g} after {c.steps[-1]:,} steps</figcaption>"
    f"{loss_svg(c)}</figure>"
    for c in curves
    if len(c.steps) > 1
  )
  return f'<div class="cards plots">{cards}</div>' if cards else ""


def _steps(steps: Sequence[tuple[str, str, float]]) -> str:
  if not steps:
    return ""
  longest = max(seconds for *_, seconds in steps) or 1.0
  rows = "".join(
    f"<tr><th>{_text(name)}</th><td>{_text(note)}</td><td class=num>{clock(seconds)}</td>"
    f'<td class="line"><i style="width:{max(100 * seconds / longest, 0.5):.1f}%"></i></td></tr>'
    for name, note, seconds in steps
  )
  total = (
    f"<tr class=total><th>together</th><td></td><td class=num>{clock(sum(s for *_, s in steps))}</td><td></td></tr>"
  )
  return f'<div class="wide"><table class="steps">{rows}{total}</table></div>'


def _commands(commands: Sequence[tuple[str, str]]) -> str:
  return "".join(f"<p class=what>{_text(what)}</p><pre>{_text(command)}</pre>" for what, command in commands)


def _machine(machine: Mapping[str, str]) -> str:
  rows = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in machine.items())
  return f"<dl>{rows}</dl>" if rows else ""


_STYLE = """
:root{--paper:#fbfaf8;--card:#fff;--ink:#23262b;--soft:#6b7078;--rule:#e6e3dd;--own:#3f6ad8;--ref:#9db2e6;--low:#c9c5bd;
--right:#2c9350;--wrong:#cf4b43}
@media (prefers-color-scheme:dark){:root{--paper:#17191d;--card:#1f2227;--ink:#e7e5e0;--soft:#9a9fa8;--rule:#31353c;
--own:#7d9ff5;--ref:#4a5f96;--low:#545861;--right:#58c47d;--wrong:#ee7a72}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1040px;margin:0 auto;padding:56px 24px 80px}
h1{font-size:clamp(30px,5vw,44px);line-height:1.12;font-weight:650;letter-spacing:-.022em;margin:0 0 14px;
text-wrap:balance}
h2{font-size:22px;font-weight:640;letter-spacing:-.012em;margin:0 0 4px}
h3{font-size:13px;font-weight:600;color:var(--soft);margin:26px 0 10px}
h3::first-letter{text-transform:uppercase}
p{margin:0}
section{margin-top:60px}
.eyebrow{font-size:13px;font-weight:600;color:var(--own);margin-bottom:10px}
.lead{font-size:18px;color:var(--soft);max-width:46em;text-wrap:pretty}
.note{color:var(--soft);margin-bottom:18px;max-width:52em}
h2+div,h2+p.what{margin-top:16px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px;margin-top:30px}
.facts div{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 18px}
.facts b{display:block;font-size:25px;font-weight:640;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.facts span{font-size:13.5px;color:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:4px 22px;font-size:14px;color:var(--soft);margin-bottom:14px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:8px}
.s0{background:var(--own)}.s1{background:var(--ref)}.s2{background:var(--low)}
.scores{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:6px 22px}
.row{display:grid;grid-template-columns:140px 1fr;align-items:center;padding:11px 0;border-top:1px solid var(--rule)}
.row:first-child{border:0}
.row>b{font-weight:500}.row>b::first-letter{text-transform:uppercase}
.row.total>b{font-weight:680}
.bar{display:flex;align-items:center;height:17px;padding-right:84px}
.bar i{height:9px;min-width:2px;border-radius:0 4px 4px 0;flex:none}
.bar span{font-size:12.5px;color:var(--soft);margin-left:8px;white-space:nowrap;font-variant-numeric:tabular-nums}
.total .bar:first-child span{color:var(--ink);font-weight:640}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:16px}
@media (min-width:800px){.cards.large{grid-template-columns:1fr 1fr}}
figure,.answer{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:12px}
figcaption{font-size:14.5px;margin-top:9px;color:var(--ink)}
img{display:block;width:100%;image-rendering:pixelated;border-radius:5px;background:var(--rule)}
.strip{display:grid;grid-template-columns:repeat(4,1fr);gap:8px}
.strip span{position:relative}
img{outline:1px solid var(--rule)}
.strip img{outline-width:2px}
img.right{outline-color:var(--right)}img.wrong{outline-color:var(--wrong)}
.strip em{position:absolute;right:-4px;bottom:-4px;width:17px;height:17px;border-radius:50%;color:var(--card);
font:700 11px/17px system-ui,sans-serif;text-align:center}
em.right{background:var(--right)}em.wrong{background:var(--wrong)}
.prompt{font-size:18px;margin:0 0 12px}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(84px,1fr));gap:14px}
.pairs img+img{margin-top:6px}
.answer{display:grid;grid-template-columns:84px 1fr;gap:14px;align-items:center}
.answer div{min-width:0;overflow-wrap:anywhere}
.answer p{font-size:14.5px;color:var(--soft);line-height:1.4}
.answer .said{font-size:17px;font-weight:640;margin-top:3px}
.said.right{color:var(--right)}.said.wrong{color:var(--wrong)}
.answer small{color:var(--soft)}
.plots{grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}
.plots figcaption{margin:0 0 6px;color:var(--soft);font-size:14px}
.plots figcaption b{color:var(--ink);font-weight:600;margin-right:6px}
.plot{display:block;width:100%;font:12px system-ui,sans-serif}
.plot text{fill:var(--soft);font-variant-numeric:tabular-nums}
.plot .rule{stroke:var(--rule)}
.plot path{fill:none;stroke:var(--own);stroke-linejoin:round}
.plot .raw{opacity:.28;stroke-width:1}.plot .course{stroke-width:2}.plot .end{fill:var(--own)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:15px}
th,td{text-align:left;padding:8px 16px 8px 0;border-top:1px solid var(--rule);vertical-align:baseline}
tr:first-child>*{border-top:0}
th{font-weight:560;white-space:nowrap}
td{color:var(--soft)}
.num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums;color:var(--ink)}
.line{width:22%;min-width:70px}
.line i{display:block;height:9px;border-radius:0 4px 4px 0;background:var(--own)}
tr.total>*{font-weight:640;color:var(--ink)}
.what{color:var(--soft);font-size:15px;margin:14px 0 5px}
pre{margin:0;padding:12px 16px;background:var(--card);border:1px solid var(--rule);border-radius:10px;overflow-x:auto;
font:13.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
dl{display:grid;grid-template-columns:max-content 1fr;gap:5px 24px;margin:14px 0 0;font-size:15px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:560px){main{padding:34px 16px 60px}section{margin-top:44px}.row{grid-template-columns:1fr;gap:4px}
.scores{padding:6px 14px}.steps td:nth-child(2){display:none}}
"""
