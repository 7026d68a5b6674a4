"""`blip3o plan --search`: which batch a chip, mesh and remat policy give most images a second, on paper."""

import dataclasses
import itertools
import json
import math

from ml_collections import ConfigDict

from blip3o_jax.errors import CheckFailed, UserError
from blip3o_jax.nn.stack import REMAT_POLICIES
from blip3o_jax.planning import estimate, plan, programs, topology
from blip3o_jax.planning.plan import Plan
from blip3o_jax.planning.topology import Topology

BATCHES = (1, 2, 4, 8, 16, 32, 64)  # images a chip
TENSOR = (1, 2, 4)
COMPILED = 3
MARGIN = 0.9  # of the memory: what the estimate may be off by


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A setting and its estimate: bytes on a chip, images a second where nothing overlaps.

  By what bounds them nearly all settings are alike, as arithmetic does: they differ in how much must hide behind it.
  """

  config: ConfigDict
  words: str
  peak: float
  rate: float


def candidates(config: ConfigDict, where: Topology, job: str) -> list[Candidate]:
  """Everything that may fit by estimate, the fastest first; of those within a hundredth that with more room.

  Meshes are data * fsdp * tensor = chips of a slice, in powers of two; a model's axes need not divide (what does not is
  whole on every chip). Remat matters to training alone.
  """
  place = programs.place_of(job, where)
  chips = len(place.devices) // place.slices
  policies = [name for name in REMAT_POLICIES if name != "none"] if job == "train" else [config.remat]
  powers = [2**i for i in range(chips.bit_length()) if chips % 2**i == 0]
  found = []
  for tensor, fsdp in itertools.product(TENSOR, powers):
    if chips % (tensor * fsdp):
      continue
    mesh, built = {"slice": place.slices, "data": chips // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}, None
    for images, remat in itertools.product(BATCHES, policies):
      new = config.copy_and_resolve_references()
      with new.unlocked():
        new.update(mesh=mesh, batch_size=images * len(where.devices), accumulate=1, remat=remat)
      try:
        if built is None:  # it takes a second, and only the mesh matters to it
          part, _ = programs.of_a_process(new, where, job)
          built = programs.build(part, programs.make_mesh(part, place, job), job)
        guess = estimate.estimate(new, where, job, built)
      except UserError:  # the hosts or the batch do not divide
        continue
      if guess.peak <= MARGIN * where.chip.hbm:
        sizes = f"data {mesh['data']}, fsdp {fsdp}, tensor {tensor}"
        words = f"{images:>3} a chip, {sizes}, remat {remat or 'as the preset says'}"
        found.append(Candidate(new, words, guess.peak, new.batch_size / guess.times.total))
  return sorted(found, key=lambda c: (-round(math.log(c.rate), 2), c.peak))


def run(config: ConfigDict, name: str, *, slices: int = 1, job: str = "train", as_json: bool = False) -> None:
  """Print the best candidates by estimate, then the best three as compiled.

  Raises:
    UserError: as `plan.make` does. CheckFailed: nothing fits.
  """
  where = topology.get(name, slices)
  found = candidates(config, where, job)
  if not found:
    raise CheckFailed(f"nothing that was tried fits {name}, by estimate; take more chips, or chips with more memory")
  if not as_json:
    print(f"{len(found)} settings fit {slices} x {name} by estimate; the best, as if nothing overlapped:")
    for c in found[:10]:
      print(f"  {c.words:<58} {c.peak / 2**30:6.2f} GiB  {c.rate:10,.1f} images/s")
    print(f"the best {min(COMPILED, len(found))}, compiled (bounds, not measured speeds):", flush=True)
  plans = []
  for c in found[:COMPILED]:
    made = plan.make(c.config, name, slices=slices, job=job, advise=False)
    plans.append((c, made))
    if not as_json:
      print(f"  {c.words:<58} {_words(made)}", flush=True)
  if as_json:
    print(
      json.dumps([{"setting": c.words.strip(), "estimate_bytes": c.peak} | plan.record(p) for c, p in plans], indent=2)
    )
  if not any(p.fits for _, p in plans):
    raise CheckFailed(f"none of the best fits {name}, as compiled; take more chips, or chips with more memory")
  if not as_json:  # of those that the same bounds the first is the best
    best, made = max(((c, p) for c, p in plans if p.fits), key=lambda cp: round(cp[1].images_per_second, 1))
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in best.config.mesh.items())
    remat = f" --config.remat={best.config.remat}" if best.config.remat else ""
    print(f"the best: --config.batch_size={made.images} {mesh}{remat}")


def _words(made: Plan) -> str:
  if not made.fits:
    return f"no fit, {made.short / 2**30:.2f} GiB short"
  by = max(made.costs, key=lambda c: c.bounds.seconds).bounds.by
  return f"{made.peak / 2**30:6.2f} GiB  {made.images_per_second:10,.1f} images/s, by {by}"
