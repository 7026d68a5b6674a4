"""The public class: a model directory in, pictures and answers out."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from blip3o_jax.data import templates, transforms, vision
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.inference import image as drawing
from blip3o_jax.inference import text as talking
from blip3o_jax.models.blip3o import BACKBONES, Blip3o
from blip3o_jax.models.qwen2_5_vl import Qwen25VLConfig
from blip3o_jax.porting.locate import open_model
from blip3o_jax.porting.source import abstract_params

Picture = Image.Image | np.ndarray | str | os.PathLike
_BUCKET = 16  # prompts are padded to a multiple of this, so that few programs serve all lengths


def load(name_or_path: str | os.PathLike, *, mesh: jax.sharding.Mesh | None = None, dtype: str = "bfloat16") -> "Model":
  """Open a model directory, the release's layout, a hub id, or a bundled model by its name ("micro").

  Args:
    mesh: spread the weights over its devices by sharding.rules, each leaf as it is read. None: the default device.
    dtype: of weights and computation. On a CPU float32 is used in its place, which is faster there and exact.

  Raises:
    UserError: it is no model directory, or a part is missing or damaged.
  """
  if jax.default_backend() == "cpu":
    dtype = "float32"
  source = open_model(name_or_path)
  names = tuple(name for name in source.components if name != "text_tower")
  return Model(
    Blip3o(source.config(), dtype=jnp.dtype(dtype)),
    source.read(names, abstract_params(source.config(), names, mesh=mesh), dtype=jnp.dtype(dtype)),
    load_tokenizer(source.tokenizer_dir()),
    vision.ImageProcessor.from_reference(source.image_preprocessor()),
    _replaced(drawing.Sampling(), source.sampling),
    name=source.name,
  )


class Model:
  """Weights, tokenizer and compiled programs of one model. Make it with `load`.

  Attributes:
    model: the Flax module; params: {component: tree}; sampling: defaults for drawing; batch_size: pictures at once.
  """

  def __init__(self, model: Blip3o, params: Any, tokenizer, processor, sampling: drawing.Sampling, *, name: str = ""):
    self.model, self.params, self.tokenizer, self.processor = model, params, tokenizer, processor
    self.sampling, self.name = sampling, name
    self.batch_size = 32

  # ---- pictures

  def generate(
    self,
    prompts: str | Sequence[str],
    *,
    num: int = 1,
    seed: int = 0,
    guidance: float | None = None,
    steps: int | None = None,
    **settings,
  ) -> list[list[np.ndarray]]:
    """Draw `num` pictures for each prompt: for every prompt a list of uint8 [H, W, 3].

    Picture i depends on (prompt, seed, i) and the settings alone, not on what is drawn beside it.

    Args:
      guidance, steps: of the DiT; None: the model's own defaults. `settings`: other fields of image.Sampling.

    Raises:
      UserError: an empty prompt, an unknown setting, a part that this model directory lacks.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if num < 1:
      raise UserError(f"num is {num}; ask for at least one picture")
    for i, prompt in enumerate(prompts):
      if not prompt.strip():
        raise UserError(f"prompt {i} is empty; say what to draw")
    sampling = self._sampling(guidance=guidance, steps=steps, **settings)
    self._need("backbone", "queries", "dit", "unet", "vae")
    rows = [
      templates.generation_prompt(self.tokenizer, p, form=sampling.form, wording=sampling.wording) for p in prompts
    ]
    work = [(p, i) for p in range(len(prompts)) for i in range(num)]
    pictures: list[list[np.ndarray]] = [[] for _ in prompts]
    for part, real in _batches(work, self.batch_size):
      keys = drawing.picture_keys(seed, np.asarray([i for _, i in part]))
      pixels = self._draw([rows[p] for p, _ in part], keys, sampling)
      for (p, _), picture in list(zip(part, pixels, strict=True))[:real]:
        pictures[p].append(picture)
    return pictures

  def reconstruct(self, images: Picture | Sequence[Picture], *, seed: int = 0, **settings) -> list[np.ndarray]:
    """Encode pictures to CLIP features and draw them from these: uint8 [H, W, 3] each (spec 4.4, 6.5 image path).

    Pictures are squashed to the encoder's square, as the release does; crop them first to keep the proportions. Each
    result depends on (picture, seed) and the settings alone.
    """
    sampling = self._sampling(**settings)
    self._need("clip", "unet", "vae")
    pixels = [self._clip_pixels(x) for x in _listed(images)]
    out = []
    for part, real in _batches(pixels, self.batch_size):
      features = drawing.encode_features(self.model, self.params, np.stack(part))
      null = jnp.broadcast_to(drawing.null_image_features(self.model, self.params), features.shape)
      keys = drawing.picture_keys(seed, np.zeros(len(part)))  # picture 0 of each, whatever lies beside it
      out += list(self._decode(features, null, keys, sampling))[:real]
    return out

  def features(self, images: Picture | Sequence[Picture]) -> np.ndarray:
    """Pooled CLIP features of pictures, float32 [B, N, C], row-major."""
    self._need("clip")
    pixels = np.stack([self._clip_pixels(x) for x in _listed(images)])
    return np.asarray(drawing.encode_features(self.model, self.params, pixels))

  # ---- words

  def chat(self, prompt: str, *, images: Picture | Sequence[Picture] = (), max_new_tokens: int = 128) -> str:
    """Answer one message about any number of pictures (greedy)."""
    if not prompt.strip():
      raise UserError("the prompt is empty; ask something")
    return self._answer([_listed(images)], [prompt], max_new_tokens)[0]

  def answer(
    self, images: Sequence[Picture | None], questions: Sequence[str], *, max_new_tokens: int = 16
  ) -> list[str]:
    """Answer a batch of questions, each about one picture or none (greedy)."""
    if len(images) != len(questions):
      raise UserError(f"{len(images)} pictures for {len(questions)} questions; give one (or None) for each")
    out = []
    for part, real in _batches(list(zip(images, questions, strict=True)), 4 * self.batch_size):
      out += self._answer([[] if x is None else [x] for x, _ in part], [q for _, q in part], max_new_tokens)[:real]
    return out

  def content_hash(self, component: str) -> str:
    """The content hash of a component, as its model directory states it."""
    return open_model(self.name).content_hash(component)

  # ---- inside

  def _sampling(self, **changes) -> drawing.Sampling:
    return _replaced(self.sampling, {k: v for k, v in changes.items() if v is not None})

  def _need(self, *names: str) -> None:
    if missing := [name for name in names if name not in self.params]:
      raise UserError(f"{self.name} holds no {', '.join(missing)}; train or convert these parts first")

  def _draw(self, rows: list[list[int]], keys: jax.Array, sampling: drawing.Sampling) -> np.ndarray:
    draw = functools.partial(
      drawing.draw_features,
      self.model,
      self.params,
      steps=sampling.steps,
      guidance=sampling.guidance,
      shift=sampling.shift,
      exact_times=sampling.exact_times,
    )
    features = draw(*self._prompt_arrays(rows), keys)
    if sampling.decoder_guidance <= 1 or sampling.decoder_null == "zeros":
      null = jnp.zeros_like(features)
    elif sampling.decoder_null == "image":
      self._need("clip")
      null = jnp.broadcast_to(drawing.null_image_features(self.model, self.params), features.shape)
    else:  # the release: a picture drawn for one space, without any template (spec 6.5)
      blank = [*self.tokenizer.encode(" "), self.tokenizer.image_start]
      null = draw(*self._prompt_arrays([blank] * len(rows)), keys, draw=1)
    return self._decode(features, null, keys, sampling)

  def _decode(self, features, null, keys, sampling: drawing.Sampling) -> np.ndarray:
    return np.asarray(
      drawing.draw_pixels(
        self.model,
        self.params,
        features,
        null,
        keys,
        steps=sampling.decoder_steps,
        guidance=sampling.decoder_guidance,
      )
    )

  def _prompt_arrays(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, mask [B, L] padded on the right, plain positions [B, 3, L]."""
    length = -(-max(map(len, rows)) // _BUCKET) * _BUCKET
    mask = np.arange(length) < np.asarray([len(row) for row in rows])[:, None]
    tokens = np.asarray([row + [self.tokenizer.pad] * (length - len(row)) for row in rows], np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (len(rows), 3, length))
    return tokens, mask, positions

  def _answer(self, images: list[list[Picture]], questions: list[str], max_new_tokens: int) -> list[str]:
    self._need("backbone")
    cfg, merge = self.model.cfg.backbone, self.processor.merge_size
    if any(images) and not isinstance(cfg, Qwen25VLConfig):
      raise UserError(f"{self.name} answers without pictures only: they are prepared for Qwen2.5-VL's tower alone")
    pictures = [[self.processor(_open(x)) for x in row] for row in images]
    rows = []
    for question, row in zip(questions, pictures, strict=True):
      counts = [int(np.prod(grid)) // merge**2 for _, grid in row]
      missing = len(row) - question.count("<image>")
      rows.append(templates.chat_prompt(self.tokenizer, [("<image>\n" * missing + question, None)], counts))
    tokens, mask, positions = self._prompt_arrays(rows)
    patches = {}
    if any(pictures):
      longest = max(sum(len(p) for p, _ in row) for row in pictures)
      blank = (np.zeros((0, cfg.vision.patch_dim), np.float32), np.zeros((0, 3), np.int32))
      joined = [
        (np.concatenate([p for p, _ in row]), np.stack([g for _, g in row])) if row else blank for row in pictures
      ]
      patches = vision.pad_rows(
        joined,
        length=longest,
        merge_size=merge,
        window_size=cfg.vision.window_size,
        patch_size=cfg.vision.patch_size,
      )
      positions, _ = vision.rope_index(tokens, mask, patches["grid_thw"], image_token=cfg.image_token, merge_size=merge)
    answer = talking.generate_text(
      BACKBONES[type(cfg)](cfg, dtype=self.model.dtype),
      self.params["backbone"],
      tokens,
      mask,
      positions=positions,
      vision=patches,
      sampling=talking.Sampling(
        max_new_tokens=max_new_tokens,
        stop_tokens=(self.tokenizer.end, self.tokenizer.end_of_text),
        pad_token=self.tokenizer.pad,
      ),
    )
    return [self.tokenizer.decode(row).strip() for row in answer.rows()]

  def _clip_pixels(self, picture: Picture) -> np.ndarray:
    return transforms.square(_open(picture), self.model.cfg.clip.image_size, "squash")


def _replaced(sampling: drawing.Sampling, changes: Mapping[str, Any]) -> drawing.Sampling:
  fields = [f.name for f in dataclasses.fields(drawing.Sampling)]
  if unknown := sorted(set(changes) - set(fields)):
    raise UserError(f"sampling setting {unknown[0]!r} is unknown; there are {', '.join(fields)}")
  return dataclasses.replace(sampling, **changes)


def _open(picture: Picture) -> Image.Image:
  """An RGB image of a path, an array uint8 [H, W, 3] or an image. Raises UserError if it cannot be read."""
  if isinstance(picture, Image.Image):
    return picture.convert("RGB")
  if isinstance(picture, np.ndarray):
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
      raise UserError(f"a picture is {picture.dtype} {list(picture.shape)}; give uint8 [height, width, 3]")
    return Image.fromarray(picture)
  try:
    with Image.open(picture) as file:
      return file.convert("RGB")
  except FileNotFoundError:
    raise UserError(f"{picture}: no such image") from None
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise UserError(f"{picture}: not a readable image ({error})") from None


def _listed(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
  return list(images) if isinstance(images, list | tuple) else [images]


def _batches(items: list, size: int) -> Iterator[tuple[list, int]]:
  """Parts of equal size (one program): the last is filled up with its first item; also how many of a part are real.

  Fewer items than `size` make one part, rounded up to a power of two.
  """
  if items and len(items) < size:
    size = min(size, 1 << (len(items) - 1).bit_length())
  for start in range(0, len(items), size):
    part = items[start : start + size]
    yield part + part[:1] * (size - len(part)), len(part)
