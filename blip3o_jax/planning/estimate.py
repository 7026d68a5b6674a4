"""Memory and time of a job without compiling it: what a search looks at first, and what advice is checked with.

Arguments are exact. The temporaries are those of the hungriest phase (encoder, prompt, DiT, picture); a phase of
training holds the weights of a layer, gathered from all chips, its widest activations, and what is kept for later: keys
and values of the prompt, and the inputs of the layers that a gradient goes through (with more by the remat policy). The
factors were fitted to what the compiler said of the 8B and 4B (assets/plans); a test holds them to it.

Times are as in `cost`: operations, those that remat repeats as well; bytes to and from HBM, of weights alone (gathered
and read at every use); bytes on the wires (weights gathered at every use, gradients summed).
"""

import dataclasses
import math
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from blip3o_jax.models import flops
from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.planning import cost, programs
from blip3o_jax.planning.programs import Program
from blip3o_jax.planning.topology import Topology

_BF16, _F32 = 2, 4
_CODE = {"train": 110 * 2**20, "generate": 320 * 2**20, "cache-features": 16 * 2**20}
# While a layer's weights are used, those of the next one are gathered already; backwards there are gradients as well.
_FORWARD, _BACKWARD = 1.9, 6.3
# How much memory the compiler spends on gathered weights and products to be faster, beside what it does for v4 and v5e.
_SPENT = {"v5p": 1.15, "v6e": 0.91}
# How often the VAE's widest activations lie there at once, in float32, while it decodes.
_COPIES = {"v4": 2.2, "v5e": 1.6, "v5p": 2.9, "v6e": 3.2}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes on a chip, by name, and seconds of a batch."""

  memory: dict[str, float]
  times: cost.Bounds

  @property
  def peak(self) -> float:
    return sum(self.memory.values())


def estimate(config: ConfigDict, where: Topology, job: str, found: list[Program] | None = None) -> Estimate:
  """The estimate of a job on a topology.

  Args:
    found: the job's programs on the same mesh, if they are at hand; their batch may be another.

  Raises:
    UserError: as `plan.make` does.
  """
  config, where = programs.of_a_process(config, where, job)
  parts = config.accumulate if job == "train" else 1
  mesh = programs.make_mesh(config, where, job)
  found = found or programs.build(config, mesh, job)
  cfg, params = programs.architecture(config), found[0].parameters
  rows = config.batch_size / parts / (mesh.size // mesh.shape["tensor"])
  chip = where.name.partition(":")[0]
  shapes = _Shapes(config, cfg, params, mesh, rows, chip)
  phases = {"train": shapes.training, "generate": shapes.drawing, "cache-features": lambda: [shapes.encoder()]}[job]()
  arguments = max(cost.device_bytes(p.arguments) for p in found)
  memory = {"arguments": arguments, "temporaries": max(phases), "code": _CODE[job]}
  repeated = shapes.remat == "full"
  operations = sum(sum(p.flops.values()) + repeated * p.again for p in found) * config.batch_size / mesh.size
  times = cost.Bounds(
    compute=operations / where.chip.flops,
    hbm=parts * shapes.read(job) / where.chip.hbm_bandwidth,
    ici=parts * shapes.sent(job) / where.chip.ici_bandwidth,
    dcn=parts * shapes.sent_between_slices(job) / where.chip.dcn_bandwidth,
  )
  return Estimate(memory, times)


@dataclasses.dataclass(frozen=True)
class _Shapes:
  """Bytes on one chip of what the phases hold. `rows` samples are on it at once; `chip` is its generation."""

  config: ConfigDict
  cfg: Blip3oConfig
  params: Any
  mesh: Mesh
  rows: float
  chip: str

  @property
  def text(self) -> Any:
    return flops.text_of(self.cfg.backbone)

  @property
  def remat(self) -> str:
    return self.config.remat or self.text.remat

  @property
  def spent(self) -> float:
    return _SPENT.get(self.chip, 1.0)

  @property
  def length(self) -> int:
    return self.config.data.get("max_length", 128)

  def weights(self, component: str, *, layer: bool) -> float:
    """One layer's weights, or those of all layers, gathered over fsdp in the compute dtype."""
    return self.whole(component, layer=layer) if self.mesh.shape["fsdp"] > 1 else 0.0

  def whole(self, component: str, *, layer: bool) -> float:
    """The same, gathered or not."""
    if component not in self.params:
      return 0.0
    leaves = flatten_dict(self.params[component])
    stacked = [x for path, x in leaves.items() if "layers" in path and "vision" not in path]
    count = sum(math.prod(x.shape) / (x.shape[0] if layer else 1) for x in stacked)
    return _BF16 * count / self.mesh.shape["tensor"]

  def wide(self, tokens: int, *widths: float) -> float:
    """Activations of `tokens` a sample, of these widths."""
    return _BF16 * self.rows * tokens * sum(widths)

  def memory_of_prompt(self) -> float:
    """Keys and values of the prompt in all layers."""
    return self.wide(self.length, 2 * self.text.layers * self.text.kv_heads * self.text.head_size)

  def encoder(self) -> float:
    clip = self.cfg.clip
    used = _FORWARD * self.weights("clip", layer=True) + self.wide(clip.side**2 + 1, clip.mlp_dim, 3 * clip.width)
    return used * self.spent

  def prompt(self) -> float:
    text = self.text
    used = _FORWARD * self.weights("backbone", layer=True) + self.wide(self.length, 2 * text.mlp_dim, 2 * text.dim)
    # On v5e weights and activations are copied into another layout where a chip's rows are some tiles of 8 and a rest.
    rows = text.dim / self.mesh.shape["fsdp"]
    return used * (1.5 if self.chip == "v5e" and rows > 8 and rows % 8 else self.spent)

  def training(self) -> list[float]:
    text, dit, q = self.text, self.cfg.dit, self.cfg.queries
    kept = self.memory_of_prompt()
    inputs = self.wide(q, text.layers * text.dim) + self.wide(math.prod(dit.grid), dit.layers * dit.dim)
    if self.remat != "full":  # the products of every layer as well
      inputs += self.wide(q, text.layers * (2 * text.mlp_dim + 3 * text.dim))
      inputs += self.wide(math.prod(dit.grid), dit.layers * (2 * dit.ffn_dim + 8 * dit.dim))
    gradients = 2 * self.gradients("train") / self.mesh.shape["fsdp"] / self.mesh.shape["tensor"]  # in float32
    backward = (_BACKWARD * self.weights("dit", layer=True) + inputs + gradients) * self.spent
    return [self.encoder(), self.prompt() + kept, backward + kept]

  def drawing(self) -> list[float]:
    vae, side = self.cfg.vae, self.cfg.image_size
    widest = vae.block_out_channels[min(1, len(vae.block_out_channels) - 1)]
    picture = self.rows * (side // vae.patch_size) ** 2 * widest * _COPIES[self.chip] * _F32
    return [self.prompt() + self.memory_of_prompt(), picture]

  def sent(self, job: str) -> float:
    """Bytes that a chip sends for one part of a batch: weights gathered at each use, gradients, sums over tensor."""
    fsdp, tensor = (1 - 1 / self.mesh.shape[axis] for axis in ("fsdp", "tensor"))
    gathered = fsdp * sum(times * self.weights(name, layer=False) for name, times in self.uses(job).items())
    gradients = self.gradients(job) / self.mesh.shape["fsdp"] / self.mesh.shape["tensor"]
    summed = 2 * (1 - 1 / self.mesh.shape["data"]) * gradients
    text, clip = self.text, self.cfg.clip
    streams = self.wide(self.length, 4 * text.layers * text.dim) + self.wide(clip.side**2, 4 * clip.layers * clip.width)
    return gathered + summed + tensor * streams

  def read(self, job: str) -> float:
    """Bytes to and from HBM of all weights for one part of a batch: read at each use, and written where gathered."""
    ways = 1 if self.mesh.shape["fsdp"] == 1 else 2
    return ways * sum(count * self.whole(name, layer=False) for name, count in self.uses(job).items())

  def uses(self, job: str) -> dict[str, int]:
    """How often the weights of a component are used."""
    steps = {name: self.config.sampling.get(name, count) for name, count in (("steps", 30), ("decoder_steps", 50))}
    return {
      "train": {"clip": 1, "backbone": 3, "dit": 4},
      "generate": {"backbone": 2, "dit": steps["steps"], "unet": steps["decoder_steps"]},
      "cache-features": {"clip": 1},
    }[job]

  def sent_between_slices(self, job: str) -> float:
    """The same to other slices: the gradients' sums, of which each chip of a slice has its part."""
    slices = self.mesh.shape["slice"]
    return 2 * (1 - 1 / slices) * self.gradients(job) / (self.mesh.size / slices)

  def gradients(self, job: str) -> float:
    """Bytes of all gradients in the compute dtype."""
    trained = self.params.get("dit", {}) if job == "train" else {}
    return _BF16 * sum(math.prod(x.shape) for x in jax.tree.leaves(trained))


# ---- advice


def advise(config: ConfigDict, where: Topology, job: str, short: float) -> tuple[str, ...]:
  """Lines: what takes the space, and the smallest change after which the estimate, corrected by how far it was off for
  the config as it is, says that the job fits."""
  now = estimate(config, where, job)
  off = (where.chip.hbm + short) / now.peak
  lines = [", ".join(f"{name} {size * off / 2**30:.2f} GiB" for name, size in now.memory.items())]
  for change, words in _changes(config, where, job):
    peak = estimate(change, where, job).peak * off
    if peak <= where.chip.hbm:
      return (*lines, f"the smallest change that would fit, by estimate ({peak / 2**30:.2f} GiB): {words}")
  return (*lines, "no remat policy, mesh or batch of this config fits; take more chips, or chips with more memory")


def _changes(config: ConfigDict, where: Topology, job: str):
  """Configs that need less memory, the smallest change first: what costs arithmetic, then wires, then batch."""
  mesh = dict(programs.place_of(job, where).mesh(config.mesh.to_dict()).shape)

  def changed(**fields) -> ConfigDict:
    new = config.copy_and_resolve_references()
    with new.unlocked():
      new.update(fields)
    return new

  if job == "train" and config.remat != "full":
    yield changed(remat="full"), "--config.remat=full"
  sizes = dict(mesh)
  while sizes["data"] % 2 == 0:
    sizes = sizes | {"data": sizes["data"] // 2, "fsdp": sizes["fsdp"] * 2}
    yield changed(mesh=sizes), f"--config.mesh.data={sizes['data']} --config.mesh.fsdp={sizes['fsdp']}"
  chips, batch = len(where.devices) // mesh["tensor"], config.batch_size
  parts = config.accumulate
  while job == "train" and batch // (2 * parts) >= chips and batch % (2 * parts * chips) == 0:
    parts *= 2
    more = changed(mesh=sizes, accumulate=parts)
    yield more, f"--config.accumulate={parts} (the same batch in more parts), fsdp {sizes['fsdp']}"
  while batch // 2 >= chips and (batch // 2) % chips == 0:
    batch //= 2
    yield changed(mesh=sizes, batch_size=batch), f"--config.batch_size={batch}, fsdp {sizes['fsdp']}"
