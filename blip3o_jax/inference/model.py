"""The public class: a model directory in, pictures and answers out."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.data import transforms
from blip3o_jax.data.pictures import Pictures
from blip3o_jax.data.tokenizer import Tokenizer, load_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.inference import image as drawing
from blip3o_jax.inference import text as talking
from blip3o_jax.inference.prompts import (
  Dialogue,
  Picture,
  Prompts,
  Row,
  edit_request,
  listed_requests,
  make_rows,
  shown,
)
from blip3o_jax.models.blip3o import BACKBONES, DESIGNS, Blip3o
from blip3o_jax.porting.locate import open_model
from blip3o_jax.porting.preprocessor import open_pictures
from blip3o_jax.porting.source import abstract_params
from blip3o_jax.sharding import rules
from blip3o_jax.sharding.distributed import whole
from blip3o_jax.sharding.mesh import make_mesh

_MOST_KEPT = 16  # null conditions, of as many programs


def load(
  name_or_path: str | os.PathLike,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "bfloat16",
  compile_cache: str | os.PathLike | None = None,
) -> "Model":
  """Open a model directory, the release's layout, a hub id, or a bundled model by its name ("micro").

  Args:
    mesh: spread the weights over its devices by sharding.rules, each leaf as it is read, and every batch over its rows;
      devices of this process. None: the default device.
    dtype: of weights and computation. On a CPU float32 is used in its place, which is faster there and exact.
    compile_cache: a folder that keeps compiled programs for the next start (JAX_COMPILATION_CACHE_DIR does the same).

  Raises:
    UserError: it is no model directory, or a part is missing or damaged.
  """
  if compile_cache is not None:
    jax.config.update("jax_compilation_cache_dir", os.fspath(compile_cache))
  if jax.default_backend() == "cpu":
    dtype = "float32"
  source = open_model(name_or_path)
  names = tuple(name for name in source.components if name != "text_tower")
  return Model(
    Blip3o(source.config(), dtype=jnp.dtype(dtype)),
    source.read(names, abstract_params(source.config(), names, mesh=mesh), dtype=jnp.dtype(dtype)),
    load_tokenizer(source.tokenizer_dir()) if "backbone" in names else None,
    open_pictures(source.config(), source.image_preprocessor()),
    drawing.Sampling().changed(**source.sampling),
    name=source.name,
    mesh=mesh,
  )


def load_here(
  name_or_path: str | os.PathLike, *, fsdp: int = 1, compile_cache: str | os.PathLike | None = None
) -> "Model":
  """The model on all devices of this process: batches spread over them, weights cut over groups of `fsdp`.

  Raises:
    UserError: as `load` does; fsdp does not divide the devices.
  """
  devices = jax.local_devices()
  mesh = make_mesh({"data": -1, "fsdp": fsdp}, devices=devices) if max(len(devices), fsdp) > 1 else None
  return load(name_or_path, mesh=mesh, compile_cache=compile_cache)


class Model:
  """Weights, tokenizer and compiled programs of one model. Make it with `load`.

  Attributes:
    model: the Flax module; params: {component: tree}; sampling: defaults for drawing; batch_size: pictures at once.
    prompts: makes rows of requests.
  """

  def __init__(
    self,
    model: Blip3o,
    params: Any,
    tokenizer: Tokenizer | None,
    pictures: Pictures | None,
    sampling: drawing.Sampling,
    *,
    name: str = "",
    mesh: jax.sharding.Mesh | None = None,
  ):
    self.model, self.params, self.tokenizer, self.pictures = model, params, tokenizer, pictures
    self.sampling, self.name, self.mesh = sampling, name, mesh
    self.batch_size = 32
    self.prompts = Prompts(model.cfg, tokenizer, pictures, name)
    self._nothing: dict[tuple, jax.Array] = {}

  # ---- pictures

  def generate(
    self,
    prompts: str | Dialogue | Sequence[str | Dialogue],
    *,
    num: int = 1,
    seed: int | Sequence[int] = 0,
    guidance: float | None = None,
    steps: int | None = None,
    **settings,
  ) -> list[list[np.ndarray]]:
    """Draw `num` pictures for each prompt: for every prompt a list of uint8 [H, W, 3].

    Picture i depends on (prompt, seed, i) and the settings alone, not on what is drawn beside it: its noise to the bit,
    the rest to the rounding of another batch or mesh. The same call gives the same bytes. Measured with `micro`, eight
    prompts together against one by one (CPU, 2026-11-22): float32 features differ by 2e-5 of the largest and pixels by
    at most one level; in bfloat16 features by 4e-2, and 97.5 % of pixels lie within one level, 99.98 % within eight.

    Args:
      prompts: captions, or dialogues (inference.prompts) after which a picture is drawn; one of them, or a list.
      seed: of all prompts, or one for each.
      guidance, steps: of the DiT; None: the model's own defaults. `settings`: other fields of image.Sampling.

    Raises:
      UserError: an empty prompt, an unknown setting, a part that this model directory lacks.
    """
    requests, _ = listed_requests(prompts)
    sampling = self.sampling_with(guidance=guidance, steps=steps, **settings)
    if num < 1:
      raise UserError(f"num is {num}; ask for at least one picture")
    seeds = [seed] * len(requests) if np.ndim(seed) == 0 else list(seed)
    if len(seeds) != len(requests):
      raise UserError(f"{len(seeds)} seeds for {len(requests)} prompts; give one, or one for each")
    self._need(*DESIGNS[self.model.cfg.design])
    rows = make_rows(self.row_to_draw, requests, sampling)
    work = [(p, i) for p in range(len(rows)) for i in range(num)]
    pictures: list[list[np.ndarray]] = [[] for _ in rows]
    for part, real in self.batches(work, self.batch_size):
      pixels = self.draw([rows[p] for p, _ in part], [seeds[p] for p, _ in part], [i for _, i in part], sampling)
      for (p, _), picture in list(zip(part, whole(pixels), strict=True))[:real]:
        pictures[p].append(picture)
    return pictures

  def edit(
    self, images: Picture | Sequence[Picture], instructions: str | Sequence[str] = "", *, seed: int = 0, **settings
  ) -> list[np.ndarray]:
    """Draw pictures anew by instructions: uint8 [H, W, 3] each; without an instruction, reconstruct them.

    The way of the release (spec 4.4): the understanding tower reads the picture, and the instruction stands where the
    release says "Please reconstruct the given image." That sentence is all that the release knows of: no editing data
    or weights exist for BLIP3-o, so an instruction is followed as far as the model at hand has learned it.

    Args:
      images, instructions: one of each, or lists of the same length. settings: fields of image.Sampling.
    """
    images = _listed(images)
    instructions = [instructions] * len(images) if isinstance(instructions, str) else list(instructions)
    if len(images) != len(instructions):
      raise UserError(f"{len(images)} pictures for {len(instructions)} instructions; give one for each")
    pairs = zip(images, instructions, strict=True)
    requests = [edit_request(picture, instruction) for picture, instruction in pairs]
    sampling = dataclasses.asdict(self.sampling_with(**settings))
    return [row[0] for row in self.generate(requests, seed=seed, **sampling)]

  def reconstruct(self, images: Picture | Sequence[Picture], *, seed: int = 0, **settings) -> list[np.ndarray]:
    """Encode pictures to CLIP features and draw them from these: uint8 [H, W, 3] each (spec 4.4, 6.5 image path).

    Pictures are squashed to the encoder's square, as the release does; crop them first to keep the proportions. Each
    result depends on (picture, seed) and the settings alone: those of the decoder, image.PIXEL_SETTINGS.
    """
    sampling = self.sampling_with(**settings)
    if idle := [name for name in settings if name not in drawing.PIXEL_SETTINGS]:
      bearing = ", ".join(drawing.PIXEL_SETTINGS)
      raise UserError(f"setting {idle[0]!r} does not bear on a reconstruction; these do: {bearing}")
    self._need("clip", "unet", "vae")
    pixels = [self._clip_pixels(x) for x in _listed(images)]
    out = []
    for part, real in self.batches(pixels, self.batch_size):
      features = self._run(drawing.encode_features, np.stack(part))
      keys = drawing.picture_keys(seed, np.zeros(len(part), int))  # picture 0 of each, whatever lies beside it
      out += list(whole(self._decode(features, self._blank_features(features), keys, sampling)))[:real]
    return out

  def features(self, images: Picture | Sequence[Picture]) -> np.ndarray:
    """Pooled CLIP features of pictures, float32 [B, N, C], row-major."""
    self._need("clip")
    pixels, out = [self._clip_pixels(x) for x in _listed(images)], []
    for part, real in self.batches(pixels, self.batch_size):
      out.append(whole(self._run(drawing.encode_features, np.stack(part)))[:real])
    return np.concatenate(out) if out else np.zeros((0, math.prod(self.model.cfg.dit.grid), self.model.cfg.clip.width))

  def warm_up(self, *, num: int = 1, prompt: str = "a picture", **settings) -> float:
    """Compile what `generate(prompt, num=num, **settings)` and prompts of like length need; returns the seconds."""
    start = time.perf_counter()
    self.generate(prompt, num=num, **settings)
    return time.perf_counter() - start

  # ---- words

  def chat(
    self,
    messages: str | Dialogue | Sequence[str | Dialogue],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: bool = False,
  ) -> str | list[str] | Iterator[str] | Iterator[list[str]]:
    """Answer a text or a dialogue of any number of turns and pictures, or a list of them as a batch.

      model.chat([{"role": "user", "content": [picture, "What is this?"]}])

    Args:
      messages: see inference.prompts. Pictures may lie in any message: one that the model drew in the assistant's.
      temperature, top_k, top_p: 0 is greedy; see text.Sampling. seed: of the sampling; row i draws from (seed, i).
      stream: an iterator of pieces of the answer (of lists of pieces, for a batch), which joined are the answer.

    Raises:
      UserError: an empty message, a dialogue that ends with the assistant, a picture that cannot be read.
    """
    requests, single = listed_requests(messages)
    sampling = self.talk_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    rows = make_rows(self.prompts.to_answer, requests)
    if stream:
      pieces = self._stream(rows, seed, sampling)
      return (row[0] for row in pieces) if single else pieces
    said = self.reply(rows, sampling, seed=seed)
    return said[0] if single else said

  def answer(
    self, images: Sequence[Picture | None], questions: Sequence[str], *, max_new_tokens: int = 16
  ) -> list[str]:
    """Answer a batch of questions, each about one picture or none (greedy), laid out as in the training data: the
    picture on a line of its own."""
    if len(images) != len(questions):
      raise UserError(f"{len(images)} pictures for {len(questions)} questions; give one (or None) for each")
    contents = [q if x is None else [shown(x), f"\n{q}"] for x, q in zip(images, questions, strict=True)]
    return self.chat([[{"role": "user", "content": c}] for c in contents], max_new_tokens=max_new_tokens)

  # ---- for jobs: one batch at a time

  def sampling_with(self, **changes) -> drawing.Sampling:
    """The model's own settings with some changed; None changes nothing. Raises UserError for an unknown one."""
    return self.sampling.changed(**{k: v for k, v in changes.items() if v is not None})

  def row_to_draw(self, request: str | Dialogue, sampling: drawing.Sampling) -> Row:
    """A request as `draw` takes it. Raises UserError for what cannot be drawn."""
    return self.prompts.to_draw(request, form=sampling.form, wording=sampling.wording)

  def rounded(self, size: int) -> int:
    """`size`, or the next number above it that divides over the mesh: a batch costs no less."""
    places = 1 if self.mesh is None else rules.places(self.mesh)
    return -(-size // places) * places

  def batches(self, items: list, size: int) -> Iterator[tuple[list, int]]:
    """Parts of equal size (one program), the last filled up with its first item; also how many of a part are real.

    Fewer items than `size` make one part, rounded up to a power of two. A part divides over the mesh.
    """
    if items and len(items) < size:
      size = min(size, 1 << (len(items) - 1).bit_length())
    size = self.rounded(size)
    for start in range(0, len(items), size):
      part = items[start : start + size]
      yield part + part[:1] * (size - len(part)), len(part)

  def draw(
    self, rows: Sequence[Row], seeds: Sequence[int], numbers: Sequence[int], sampling: drawing.Sampling
  ) -> jax.Array:
    """Picture numbers[b] of seeds[b] for rows[b]: uint8 [B, H, W, 3], not waited for. B divides over the mesh."""
    self._need(*DESIGNS[self.model.cfg.design])
    keys = drawing.picture_keys(seeds, numbers)
    batch = self.prompts.batch(rows, draw=True)
    prompts = (batch.tokens, batch.mask, batch.positions)
    features = self._run(drawing.draw_features, *prompts, keys, vision=batch.vision, **sampling.of_features())
    if self.model.cfg.design == "vae_flow":
      return self._run(drawing.draw_latents, features)
    if sampling.decoder_guidance <= 1 or sampling.decoder_null == "zeros":
      null = jnp.zeros_like(features)
    elif sampling.decoder_null == "image":
      self._need("clip")
      null = self._blank_features(features)
    else:
      null = self._features_of_nothing(len(rows), batch.tokens.shape[1], **sampling.of_features())
    return self._decode(features, null, keys, sampling)

  def talk_settings(self, **settings) -> talking.Sampling:
    """Settings of `reply`: those of text.Sampling, with the model's own stop tokens."""
    self._need("backbone")
    stop = (self.tokenizer.end, self.tokenizer.end_of_text)
    return talking.Sampling(stop_tokens=stop, pad_token=self.tokenizer.pad, **settings)

  def reply(
    self, rows: Sequence[Row], sampling: talking.Sampling, *, seed: int = 0, size: int | None = None
  ) -> list[str]:
    """Answers to rows of `prompts.to_answer`, `size` at once."""
    said = []
    for part, real in self.batches(list(enumerate(rows)), size or 4 * self.batch_size):
      keys = drawing.picture_keys(seed, [i for i, _ in part])
      *_, answer = self._answers([row for _, row in part], keys, sampling, every=None)
      said += [text.rstrip() for text in self._texts(answer)][:real]
    return said

  def content_hash(self, component: str) -> str:
    """The content hash of a component, as its model directory states it."""
    return open_model(self.name).content_hash(component)

  @functools.cached_property
  def digest(self) -> str:
    """16 hexadecimal digits for the content of all parts; weights in the release's layout are read for it."""
    source = open_model(self.name)
    hashes = "".join(source.content_hash(name) for name in sorted(self.params))
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]

  # ---- inside

  def _run(self, program, *arrays, **settings) -> Any:
    """A compiled program on the model: the rows of every array go over the mesh; numbers and settings as they are."""
    place = lambda x: x
    if self.mesh is not None:
      place = functools.partial(_placed, sharding=rules.batch_sharding(self.mesh))
    arrays = jax.tree.map(place, arrays)
    if "vision" in settings:
      settings["vision"] = jax.tree.map(place, settings["vision"])
    with self._on_mesh():
      return program(self.model, self.params, *arrays, **settings)

  def _on_mesh(self) -> contextlib.AbstractContextManager:
    if self.mesh is None:
      return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(self.mesh))
    stack.enter_context(nn.logical_axis_rules(rules.RULES))
    return stack

  def _need(self, *names: str) -> None:
    if missing := [name for name in names if name not in self.params]:
      raise UserError(f"{self.name} holds no {', '.join(missing)}; train or convert these parts first")

  def _features_of_nothing(self, rows: int, length: int, **settings) -> jax.Array:
    """What is drawn for one space, without any template: the null condition of the release's decoder (spec 6.5).

    [rows, N, C], all rows alike. The release draws it with its first picture and keeps it for all that follow; here its
    noise is a fixed one, so that no picture depends on which was the first. Kept for each program of a batch.
    """
    key = (rows, length, *settings.values())
    if key not in self._nothing:
      blank = Row([*self.tokenizer.encode(" "), self.tokenizer.image_start])
      batch = self.prompts.batch([blank] * rows, draw=True, length=length)
      keys = drawing.picture_keys([0] * rows, [0] * rows)
      drawn = self._run(
        drawing.draw_features, batch.tokens, batch.mask, batch.positions, keys, 1, vision=batch.vision, **settings
      )
      if len(self._nothing) == _MOST_KEPT:
        self._nothing.clear()
      self._nothing[key] = drawn
    return self._nothing[key]

  def _blank_features(self, like: jax.Array) -> jax.Array:
    with self._on_mesh():
      return jnp.broadcast_to(drawing.null_image_features(self.model, self.params), like.shape)

  def _decode(self, features, null, keys, sampling: drawing.Sampling) -> jax.Array:
    return self._run(drawing.draw_pixels, features, null, keys, **sampling.of_pixels())

  def _answers(self, rows, keys, sampling: talking.Sampling, *, every: int | None) -> Iterator[talking.Answer]:
    batch = self.prompts.batch(rows, draw=False)
    cfg = self.model.cfg.backbone
    backbone = BACKBONES[type(cfg)](cfg, dtype=self.model.dtype)
    stream = lambda _, params, *arrays, vision: talking.stream_text(
      backbone,
      params["backbone"],
      *arrays[:2],
      positions=arrays[2],
      vision=vision,
      keys=arrays[3],
      sampling=sampling,
      every=every,
    )
    answers = self._run(stream, batch.tokens, batch.mask, batch.positions, keys, vision=batch.vision)
    while True:
      with self._on_mesh():
        if (answer := next(answers, None)) is None:
          return
      yield answer

  def _texts(self, answer: talking.Answer) -> list[str]:
    return [self.tokenizer.decode(row).lstrip() for row in answer.rows()]

  def _stream(self, rows, seed: int, sampling: talking.Sampling) -> Iterator[list[str]]:
    """Pieces of every answer. What may still change waits: half a character, and blanks that may be the last."""
    if not rows:
      return
    part, real = next(self.batches(list(enumerate(rows)), max(len(rows), 4 * self.batch_size)))
    keys = drawing.picture_keys(seed, [i for i, _ in part])
    told = [""] * real

    def piece(whole):
      new = [text[len(before) :] for text, before in zip(whole, told, strict=True)]
      told[:] = whole
      return new

    for answer in self._answers([row for _, row in part], keys, sampling, every=4):
      texts = self._texts(answer)[:real]
      yield piece([text.rstrip("\ufffd").rstrip() for text in texts])
    yield piece([text.rstrip() for text in texts])

  def _clip_pixels(self, picture: Picture) -> np.ndarray:
    return transforms.square(transforms.open_picture(picture), self.model.cfg.clip.image_size, "squash")


def _placed(x, sharding: jax.sharding.NamedSharding):
  """The rows of an array, of random keys too, over a mesh that may span several processes; numbers as they are."""
  if not np.ndim(x):
    return x
  if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    # device_put takes keys to devices of its own process alone.
    return jax.random.wrap_key_data(jax.device_put(jax.random.key_data(x), sharding))
  return jax.device_put(x, sharding)


def _listed(images: Picture | Sequence[Picture]) -> list[Picture]:
  return list(images) if isinstance(images, list | tuple) else [images]
