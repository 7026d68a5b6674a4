"""Understanding benchmarks through lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval): MME, MMBench, SEED, MMMU, ...

With lmms-eval installed beside this package, which tells it of the model by an entry point:

  python -m lmms_eval --model blip3o_jax --model_args pretrained=DIR --tasks mme,mmmu_val --batch_size 16

`blip3o eval understanding` runs just this; so it was with lmms-eval 0.7.3 and its task mme, its data replaced by 48
questions about the shapes world, on 2026-11-22. Limits of pictures, greedy decoding and at most 128 tokens are those
of the release's wrapper (spec 4.5). Nothing of lmms-eval is imported before it asks for the class.
"""

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
from typing import Any

from blip3o_jax.data.pictures import QwenPictures
from blip3o_jax.errors import CheckFailed, UserError
from blip3o_jax.inference.model import load_here

MIN_PIXELS, MAX_PIXELS = 256 * 28 * 28, 1605632


def manifest() -> Any:
  """What the entry point "lmms_eval.models" gives: where the class is."""
  from lmms_eval.models.registry_v2 import ModelManifest

  return ModelManifest(model_id="blip3o_jax", simple_class_path=f"{__name__}.Blip3oJax")


def run(
  model: str, tasks: str, *, batch_size: int = 16, limit: int | None = None, out: str | None = None, **loading
) -> None:
  """Run lmms-eval on a model in a process of its own; `loading`: see inference.model.load_here.

  Raises:
    UserError: it is not installed. CheckFailed: it failed.
  """
  if importlib.util.find_spec("lmms_eval") is None:
    raise UserError("lmms-eval is not installed here; `pip install lmms-eval` (it brings torch)")
  words = [sys.executable, "-m", "lmms_eval", "--model", "blip3o_jax", "--model_args"]
  words += [",".join(f"{name}={value}" for name, value in {"pretrained": model, **loading}.items())]
  words += ["--tasks", tasks, "--batch_size", str(batch_size)]
  words += ["--limit", str(limit)] if limit else []
  words += ["--log_samples", "--output_path", out] if out else []
  if status := subprocess.run(words).returncode:
    raise CheckFailed(f"lmms-eval ended with status {status}; its own lines above say why")


def answer_requests(model: Any, requests: list, task_dict: dict, batch_size: int) -> list[str]:
  """The answers to lmms-eval's requests, in their order.

  A request's `args` are (context, settings, doc_to_visual, doc_id, task, split); its pictures come before the context,
  whose own "<image>" marks are dropped, as in lmms-eval's wrapper of Qwen2.5-VL. Equal settings go together.
  """
  prepared = []
  for number, request in enumerate(requests):
    context, given, to_visual, doc_id, task, split = request.args
    visuals = to_visual(task_dict[task][split][doc_id]) or []
    content = [*visuals, context.replace("<image>", "").strip() or " "]
    settings = {
      "max_new_tokens": int(given.get("max_new_tokens", 128)),
      "temperature": float(given.get("temperature") or 0.0),
      "top_p": float(given.get("top_p") or 1.0),
    }
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else until
    # An empty line within an answer is no end: cutting there loses what comes after it.
    ends = tuple(end for end in until if end and end != "\n\n")
    prepared.append((settings, ends, number, [{"role": "user", "content": content}]))
  answers = [""] * len(requests)
  key = lambda item: (*item[0].values(), item[1])
  for _, group in itertools.groupby(sorted(prepared, key=key), key):
    group = list(group)
    for part in (group[i : i + batch_size] for i in range(0, len(group), batch_size)):
      said = model.chat([dialogue for *_, dialogue in part], **part[0][0])
      for (_, ends, number, _), text in zip(part, said, strict=True):
        answers[number] = min((text.split(end)[0] for end in ends), key=len, default=text)
  return answers


def __getattr__(name: str):
  if name != "Blip3oJax":
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return _adapter()


def _adapter() -> type:
  from lmms_eval.api.model import lmms

  class Blip3oJax(lmms):
    """lmms-eval's view of a model of this package; its first three arguments: see inference.model.load_here."""

    is_simple = True

    def __init__(
      self,
      pretrained="micro",
      fsdp=1,
      compile_cache=None,
      batch_size=16,
      min_pixels=MIN_PIXELS,
      max_pixels=MAX_PIXELS,
      **unused,
    ):
      super().__init__()
      if unused := {key: value for key, value in unused.items() if key not in ("device", "max_batch_size")}:
        known = "pretrained, fsdp, compile_cache, min_pixels, max_pixels"
        raise UserError(f"model argument {min(unused)!r} is unknown; take {known}")
      self.model, self.batch_size = load_here(pretrained, fsdp=int(fsdp), compile_cache=compile_cache), int(batch_size)
      pictures = self.model.prompts.pictures
      if isinstance(pictures, QwenPictures):  # SigLIP2 has one size for all
        limits = {"min_pixels": int(min_pixels), "max_pixels": int(max_pixels)}
        small = dataclasses.replace(pictures.processor, **limits)
        self.model.prompts.pictures = dataclasses.replace(pictures, processor=small)

    def generate_until(self, requests):
      answers = answer_requests(self.model, requests, self.task_dict, self.batch_size)
      for request, answer in zip(requests, answers, strict=True):
        self.cache_hook.add_partial("generate_until", request.args[:2], answer)
      return answers

    def generate_until_multi_round(self, requests):
      raise UserError("tasks of several rounds are not supported; choose others")

    def loglikelihood(self, requests):
      raise UserError("tasks that score given answers are not supported; choose tasks that generate")

  return Blip3oJax
