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
  """Draws `config.sample_prompts` with given weights. Has random numbers of its own: the training never notices."""

  def __init__(self, config: ConfigDict, model: Blip3o, mesh: Mesh, tokenizer_dir: Path | None, workdir: epath.Path):
    if tokenizer_dir is None:
      raise UserError("sample_every needs a tokenizer: set config.tokenizer, or an init_from that has one")
    self._config, self._model, self._mesh, self._directory = config, model, mesh, workdir / "samples"
    self._tokenizer = load_tokenizer(tokenizer_dir)

  def draw(self, step: int, params: Params) -> str:
    """Write STEP.png, a grid of one picture a prompt in their order, row by row. Called by all processes.

    Returns: what has been done, or why not: a full disk is no reason to end a training.
    """
    name = "the model in training"
    model = Model(self._model, params, self._tokenizer, None, Sampling(), name=name, mesh=self._mesh)
    drawn = model.generate(list(self._config.sample_prompts), seed=self._config.seed, **self._config.sampling.to_dict())
    path = self._directory / f"{step}.png"
    try:
      if jax.process_index() == 0:
        write_atomically(path, encode_png(square_grid([pictures[0] for pictures in drawn])))
    except OSError as error:
      return f"WARNING: samples of step {step} could not be written ({error.strerror})"
    return f"samples: {path}"
