"""Pictures drawn while a run trains: WORKDIR/samples/STEP.png, the same prompts from the same noise every time."""

from collections.abc import Collection
from pathlib import Path

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from blip3o_jax.data.outputs import encode_png, square_grid, write_atomically
from blip3o_jax.data.tokenizer import load_tokenizer
from blip3o_jax.errors import UserError
from blip3o_jax.inference.image import Sampling
from blip3o_jax.inference.model import Model
from blip3o_jax.inference.prompts import make_rows
from blip3o_jax.models.blip3o import DESIGNS, Blip3o, Blip3oConfig
from blip3o_jax.types import Params

DECODER = ("unet", "vae")  # what turns features into pixels; no objective that draws needs to hold these


def components_to_draw(config: ConfigDict, cfg: Blip3oConfig, components: Collection[str]) -> tuple[str, ...]:
  """The components to load beside those of the objective, if pictures are asked for.

  Raises:
    UserError: without prompts, or the objective does not train what draws.
  """
  if not config.sample_every:
    return ()
  if not config.sample_prompts:
    raise UserError("sample_every is set without sample_prompts; name what to draw")
  needed = DESIGNS[cfg.design] + (("clip",) if config.sampling.get("decoder_null") == "image" else ())
  absent = tuple(name for name in needed if name not in components)
  if missing := [name for name in absent if name not in (*DECODER, "clip")]:
    raise UserError(f"sample_every: objective {config.objective} draws no pictures, it has no {', '.join(missing)}")
  return absent


class Sampler:
  """Draws `config.sample_prompts` with given weights. Has random numbers of its own: the training never notices.

  Raises UserError where it is made for a prompt or a setting that cannot be drawn.
  """

  def __init__(self, config: ConfigDict, model: Blip3o, mesh: Mesh, tokenizer_dir: Path | None, workdir: epath.Path):
    if tokenizer_dir is None:
      raise UserError("sample_every needs a tokenizer: set config.tokenizer, or an init_from that has one")
    self._model, self._mesh, self._directory, self._seed = model, mesh, workdir / "samples", config.seed
    self._tokenizer = load_tokenizer(tokenizer_dir)
    self._prompts, self._settings = list(config.sample_prompts), config.sampling.to_dict()
    asked = self._with({})
    make_rows(asked.row_to_draw, self._prompts, asked.sampling_with(**self._settings))  # now, not after hours

  def _with(self, params: Params) -> Model:
    name = "the model in training"
    return Model(self._model, params, self._tokenizer, None, Sampling(), name=name, mesh=self._mesh)

  def draw(self, step: int, params: Params) -> str:
    """Write STEP.png, a grid of one picture a prompt in their order, row by row. Called by all processes.

    Returns: what has been done, or why not: a full disk or a bucket out of reach is no reason to end a training.
    """
    drawn = self._with(params).generate(self._prompts, seed=self._seed, **self._settings)
    path = self._directory / f"{step}.png"
    try:
      if jax.process_index() == 0:
        write_atomically(path, encode_png(square_grid([pictures[0] for pictures in drawn])))
    except Exception as error:  # buckets fail in more ways than have names
      return f"WARNING: samples of step {step} could not be written ({error})"
    return f"samples: {path}"
