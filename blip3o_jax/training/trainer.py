"""The trainer: one function, read from top to bottom. It knows no idea of the paper; those are objectives (floor 3)."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from blip3o_jax import objectives
from blip3o_jax.checkpoints.store import Store
from blip3o_jax.data import files
from blip3o_jax.errors import Preempted, UserError
from blip3o_jax.inference.image import Sampling
from blip3o_jax.models import presets
from blip3o_jax.models.blip3o import COMPONENTS, Blip3o
from blip3o_jax.porting import model_dir
from blip3o_jax.porting.locate import open_model
from blip3o_jax.sharding import distributed, rules
from blip3o_jax.sharding.mesh import make_mesh, reader
from blip3o_jax.training import metrics, optimizers, state
from blip3o_jax.training.defaults import claim, complete
from blip3o_jax.training.feed import Buckets, Prefetch, cached, open_loader, require_whole_groups, tokenizer_dir
from blip3o_jax.training.preemption import StopFlag
from blip3o_jax.training.profiling import Profile
from blip3o_jax.training.samples import Sampler, components_to_draw
from blip3o_jax.training.state import TrainState
from blip3o_jax.training.step import make_step, streams
from blip3o_jax.training.throughput import Timing, step_flops
from blip3o_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a finished run leaves behind. `metrics` are those of the last step."""

  workdir: epath.Path
  model_dir: epath.Path
  steps: int
  metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled heart of a run, without any array: what `train` loops over and `plan` compiles ahead of time.

  `params`, `state` and `frozen` are trees of ShapeDtypeStruct that carry dtype and final sharding;
  `step(state, frozen, batch) -> (state, scalars)` is jitted and takes over the memory of `state`; `flops(batch)`: see
  training.throughput.step_flops; `create(trained)` makes a state of parameters, whose memory it takes over.
  """

  model: Blip3o
  mesh: Mesh
  components: tuple[str, ...]
  params: Params
  frozen: Params
  state: TrainState
  step: Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]
  flops: Callable[[Batch], float | None]
  create: Callable[[Params], TrainState]


def train(config: ConfigDict, workdir: str | os.PathLike, *, command: str = "") -> TrainResult:
  """Train one stage to its end, or go on with it: the same command does both. In a job of several processes all call
  this, after sharding.distributed.start().

  Leaves in `workdir`: config.json, began.txt (when, in Unix seconds), parameters.txt, metrics.jsonl, checkpoints/, at
  the end model/, on accelerators compiled/ (JAX's compilation cache), and if asked for samples/ and profile/.

  Args:
    config: fields of `training.defaults.default_config()`.
    workdir: directory of this run alone, or gs://...; one that another config made is refused.
    command: what to type to do this again; told in the model's provenance.

  Raises:
    UserError: bad config, missing input, a loss that stays non-finite, or the last save failed (one before that is told
      and tried again at the next).
    Preempted: SIGTERM came, or in a job of one process SIGINT; the finished steps are saved.
  """
  # 1. The run: is it new, half done, or done?
  config, workdir = complete(config), epath.Path(workdir)
  exported = workdir / "model"
  with files.reading(os.fspath(workdir)):  # a bucket may be out of reach, or want a package that is not here
    changed = claim(workdir, config, write=False)
  if (exported / "model.json").exists():
    print(f"{workdir} is finished; the model is at {exported}", flush=True)
    lines = metrics.read(workdir / "metrics.jsonl")
    return TrainResult(workdir, exported, config.steps, lines[-1] if lines else {})

  # 2. Devices, model, optimizer, the jitted step, the data. Nothing is allocated or written yet, but all is checked.
  mesh = make_mesh(config.mesh, batch_size=config.batch_size, parts=config.accumulate)
  program = build(config, mesh)
  sampler = Sampler(config, program.model, mesh, _tokenizer(config), workdir) if config.sample_every else None
  Sampling().changed(**config.sampling.to_dict())  # the finished model's own, which would be refused where it draws
  loader_from = open_loader(config, program.model.cfg, reader(mesh, jax.process_index()))
  main_process = jax.process_index() == 0
  say = functools.partial(print, flush=True) if main_process else lambda *_: None
  say(f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}")
  say(f"parameters:\n{state.overview(program.state.trained, program.frozen)}")
  if changed:
    say(f"WARNING: from here on with another config: {changed}")
  failure = None
  if main_process:
    table = parameter_overview.get_parameter_overview(program.params, include_stats=False, max_lines=None)
    try:
      claim(workdir, config, write=True)
      (workdir / "parameters.txt").write_text(table + "\n")  # every single one, for who wants to look
    except Exception as error:  # buckets fail in more ways than have names
      failure = UserError(f"{workdir} cannot be written ({error}); give another --workdir, or the right to write there")
  _require_shared(workdir, failure)
  # What goes on after a pre-emption finds its program compiled. Not on CPUs, which differ in what they can execute.
  if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", os.fspath(workdir / "compiled"))

  again = lambda words: say(f"WARNING: {words}; training goes on, and the next save tries again")
  with (
    jax.set_mesh(mesh),
    Store(workdir / "checkpoints", keep=config.keep, tell=again) as store,
    StopFlag(enabled=jax.process_count() == 1) as stop,
  ):
    # 3. Where the numbers come from: the first of these that has them.
    #    1) this run's own newest checkpoint (what trains)
    #    2) init_from (what is frozen, always; what trains, in a fresh run)
    #    3) scratch, by seed
    start, sources, record = store.latest() or 0, frozen_sources(config, program), {}
    params = initial_params(config, program, program.frozen if start else program.params, say)
    if start:
      train_state, record = store.restore(start, program.state)
      start = record["position"]
      if any(sources.get(name, hash) != hash for name, hash in record["frozen"].items()):
        raise UserError(f"{config.init_from} holds other weights than when {workdir} began; give another --workdir")
      frozen = _pick(params, program.frozen)
      say(f"goes on after step {start} of {workdir / 'checkpoints'}")
    else:
      train_state, frozen = fresh_state(program, params)
    del params

    # 4. Data from the first step not yet done; the position is one integer for any number of hosts.
    past = {key: record.get(key, 0.0) for key in ("seconds", "useful")}
    timing = Timing(workdir, write=main_process, **past)
    log = metrics.MetricLog(
      workdir,
      timing,
      mesh.devices.flatten(),
      start=start,
      steps=config.steps,
      every=config.log_every,
      batch_size=config.batch_size,
      max_bad=config.max_bad_steps,
      tensorboard=config.tensorboard,
    )

    # 5. The loop. The host runs one step ahead: what is logged is always the step before.
    def save(done: int, *, insist: bool = False) -> None:
      log.put()  # the lines up to a checkpoint are on disk before it is
      if log.bad and not insist:
        return say(f"step {done} is not saved: the last {log.bad} steps were not finite, those before are kept")
      with timing.lost("save"):
        times = {"seconds": timing.seconds, "useful": timing.useful}
        record = {"position": done, "seed": config.seed, "frozen": sources, **times}
        store.save(done, train_state, record, insist=insist)

    def preempt(done: int) -> None:
      save(done, insist=True)
      raise Preempted(f"stopped after step {done} of {config.steps}; saved in {workdir}, run the same command again")

    with (
      Prefetch(loader_from(start), rules.batch_sharding(mesh)) as prefetch,
      Profile(workdir / "profile", start + 3, config.profile) as profile,
    ):
      batches, step = prefetch, program.step
      if buckets := tuple(config.data.get("buckets", ())):
        with timing.lost("data"):
          batches = Buckets(batches, buckets, rules.batch_sharding(mesh))
        with timing.lost("compile"):
          step = batches.compile(program, say)
      for done in range(start + 1, config.steps + 1):
        try:
          with timing.lost("data"):
            batch = next(batches)
        except Exception:
          if not stop.requested:  # Ctrl-C reaches the loader's worker processes too
            raise
          preempt(done - 1)
        profile.before(done)
        first = done == start + 1
        with (
          jax.transfer_guard("allow" if first else "disallow"),  # tracing may move constants
          timing.lost("compile") if first else contextlib.nullcontext(),
        ):
          train_state, scalars = step(train_state, frozen, batch)
        log.add(done, scalars, program.flops(batch), prefetch.counts)
        profile.after(done, scalars)
        store.settle(wait=False)
        if stop.requested or (jax.process_count() > 1 and store.reached_preemption(done)):
          preempt(done)
        if sampler and done % config.sample_every == 0:
          log.flush()  # else drawing would wait for the step, and its time be taken for drawing's
          with timing.lost("sample"):
            say(sampler.draw(done, state.merge(train_state.ema or train_state.trained, frozen)))
        if done == config.steps or done % config.save_every == 0:
          save(done, insist=done == config.steps)
    log.put()
    log.close()

    # 6. The model directory: averaged weights if there are any, and the untouched components of init_from.
    trained = train_state.ema if config.ema_decay else train_state.trained
    facts = {"seconds": round(timing.seconds), "metrics": log.last}
    if command:
      facts["command"] = command
    export(config, program, state.merge(trained, frozen), exported, facts)
  say(f"finished: {exported}")
  return TrainResult(workdir, exported, config.steps, log.last)


def _require_shared(workdir: epath.Path, failure: UserError | None) -> None:
  """Raise on every process if the first could not write, or one does not see what it has written: a disk of its own,
  whose checkpoints would be parts that never come together."""
  distributed.barrier("the working directory")
  seen = distributed.everyone(not failure and (workdir / "config.json").exists())
  if failure:
    raise failure
  if lacking := np.flatnonzero(~seen).tolist():
    raise UserError(f"processes {lacking} do not see {workdir} of process 0; give a disk that all share, or gs://...")


def build(config: ConfigDict, mesh: Mesh, kind: type[Blip3o] | None = None) -> Program:
  """Model, optimizer and step of a config on a mesh; shapes and shardings only, no arrays.

  Args:
    kind: a module with the parameters of Blip3o that computes in another way.

  Raises:
    UserError: unknown names, `trainable` matches nothing, or a group of the data does not divide over the mesh.
  """
  objective = objectives.get(config.objective)
  if unknown := sorted(set(config.components) - set(COMPONENTS)):
    raise UserError(f"components: {unknown[0]!r} is no part of the model; there are {', '.join(COMPONENTS)}")
  components = tuple(config.components) or objective.COMPONENTS
  require_whole_groups(config, rules.places(mesh) * config.accumulate)
  dtype = jnp.dtype(config.compute_dtype)
  architecture = config.model.to_dict()
  cfg = presets.get(architecture["preset"], architecture["overrides"])
  if cached(config, cfg):
    components = tuple(name for name in components if name != "clip")
  components += components_to_draw(config, cfg, components)
  model = (kind or Blip3o)(presets.with_remat(cfg, config.remat) if config.remat else cfg, dtype=dtype)
  optimizer = optimizers.make_optimizer(config.optimizer)
  schedule = optimizers.make_schedule(config.schedule, config.optimizer.learning_rate, config.steps)

  # Boxed leaves carry the logical axis names through the split, the casts and the optimizer's own trees.
  boxed = jax.eval_shape(lambda: model.init_components(jax.random.key(0), components))
  trained, frozen = state.split(boxed, config.trainable)
  objectives.check(config.objective, config.objective_args.to_dict(), trained)
  frozen = jax.eval_shape(lambda x: state.cast(x, dtype), frozen)
  create = functools.partial(state.create, optimizer=optimizer, ema=bool(config.ema_decay))
  fresh = jax.eval_shape(create, trained)
  # Muon multiplies whole matrices: each device does so for some of the layers, rather than all devices for all.
  spread = "data" if config.optimizer.name == "muon" else None
  opt_state = rules.placed(mesh, fresh.opt_state, layers=spread)
  frozen, fresh = rules.placed(mesh, frozen), rules.placed(mesh, fresh).replace(opt_state=opt_state)

  # The gradient of a convolution inside a rolled loop is twenty times slower on the CPU back end.
  unroll = mesh.devices.flat[0].platform == "cpu"
  step = make_step(config, model, objective, optimizer, schedule, unroll=unroll)
  shardings = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  step = jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(shardings(fresh), shardings(frozen), rules.batch_sharding(mesh)),
    out_shardings=(shardings(fresh), rules.replicated(mesh)),
  )
  # On its final sharding at once: on any other the second step would compile again.
  create = jax.jit(create, donate_argnums=0, out_shardings=shardings(fresh))
  flops = step_flops(objective, config.objective_args.to_dict(), model.cfg, fresh.trained)
  return Program(model, mesh, components, state.merge(fresh.trained, frozen), frozen, fresh, step, flops, create)


def initial_params(config: ConfigDict, program: Program, wanted: Params, say: Callable = print) -> Params:
  """Parameters of every component in `wanted` (dtypes and shardings as in `program.params`): init_from, then scratch.

  Raises:
    UserError: init_from is missing, does not fit, or lacks a component that is frozen.
  """
  wanted = {name: program.params[name] for name in wanted}
  source = open_model(config.init_from) if config.init_from else None
  there = tuple(name for name in wanted if source and name in source.components)
  scratch, params = tuple(name for name in wanted if name not in there), {}
  if frozen := [name for name in scratch if name in program.frozen]:
    if config.init_from:
      raise UserError(
        f"{config.init_from} has no {frozen[0]}, which is frozen here; give an init_from that has, or train it"
      )
    say(f"WARNING: frozen but random, as init_from is empty: {', '.join(frozen)}")
  if there:
    params = source.read(there, {name: wanted[name] for name in there})
    say(f"from {config.init_from}: {', '.join(there)}")
  if scratch:
    target = {name: wanted[name] for name in scratch}

    def init(rng):
      fresh = nn.unbox(program.model.init_components(rng, scratch))
      return jax.tree.map(lambda x, t: x.astype(t.dtype), fresh, target)

    out = jax.tree.map(lambda x: x.sharding, target)
    params |= jax.jit(init, out_shardings=out)(streams(config.seed)[0])
    say(f"from scratch: {', '.join(scratch)}")
  return params


def fresh_state(program: Program, params: Params) -> tuple[TrainState, Params]:
  """(a new state, what is frozen) of the program's parameters; the state takes over the memory of what trains."""
  return program.create(_pick(params, program.state.trained)), _pick(params, program.frozen)


def frozen_sources(config: ConfigDict, program: Program) -> dict[str, str]:
  """Content hash in init_from of every component that is frozen at least in part: a resumed run must find the same."""
  if not config.init_from:
    return {}
  source = open_model(config.init_from)
  return {name: source.content_hash(name) for name in program.frozen if name in source.components}


def _tokenizer(config: ConfigDict) -> Path | None:
  return tokenizer_dir(config, open_model(config.init_from) if config.init_from else None)


def export(config: ConfigDict, program: Program, params: Params, directory: epath.Path, facts: dict[str, Any]) -> None:
  """Write the model directory of a finished run. What init_from has and was not trained is carried over as it is."""
  source = open_model(config.init_from) if config.init_from else None
  carried = source.components if source else ()
  model_dir.write(
    directory,
    preset=config.model.preset,
    overrides=config.model.to_dict()["overrides"],
    params={name: tree for name, tree in params.items() if name in program.state.trained or name not in carried},
    format=config.export,
    carry_from=source,
    tokenizer_dir=tokenizer_dir(config, source),
    sampling=config.sampling.to_dict(),
    provenance={
      "objective": config.objective,
      "trained": sorted(program.state.trained),
      "steps": config.steps,
      "batch_size": config.batch_size,
      "seed": config.seed,
      "machine": f"{program.mesh.size} x {program.mesh.devices.flat[0].device_kind}, jax {jax.__version__}",
      **facts,
    },
  )


def _pick(params: Params, wanted: Params) -> Params:
  """The leaves of `params` that `wanted` has."""
  return {k: _pick(params[k], v) if isinstance(v, dict) else params[k] for k, v in wanted.items()}
