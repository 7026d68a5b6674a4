"""One update as a pure function."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.nn.stack import written_out
from blip3o_jax.sharding import rules
from blip3o_jax.training import optimizers, state
from blip3o_jax.training.state import TrainState
from blip3o_jax.types import Batch, Params


def streams(seed: int) -> tuple[jax.Array, jax.Array]:
  """Independent keys for initialisation and for the steps."""
  init, steps = jax.random.split(jax.random.key(seed))
  return init, steps


def make_step(
  config: ConfigDict, model: Blip3o, objective: Any, optimizer: Any, schedule: Any, *, unroll: bool = False
) -> Callable:
  """The pure function (state, frozen, batch) -> (state, scalars) of one update; `unroll`: the loop over parts, too."""
  args = config.objective_args.to_dict()
  parts = config.accumulate

  def sums(trained, frozen, batch, rng):
    total, weight, sums = objective.loss(state.merge(trained, frozen), batch, rng, model=model, cfg=args)
    return total.astype(jnp.float32), {"weight": weight, **sums}

  def accumulated(trained, frozen, batch, rng):
    """Gradient of the summed loss over the parts of a batch; each part is spread over all devices."""
    gradient = jax.value_and_grad(sums, has_aux=True)
    if parts == 1:
      return gradient(trained, frozen, batch, rng)
    parted = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry, part):
      i, batch = part
      return jax.tree.map(jnp.add, carry, gradient(trained, frozen, batch, jax.random.fold_in(rng, i))), None

    first = jax.eval_shape(gradient, trained, frozen, jax.tree.map(lambda x: x[0], parted), rng)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(add, zero, (jnp.arange(parts), parted), unroll=unroll)[0]

  def step(old: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    with nn.logical_axis_rules(rules.RULES), written_out(gradient=True):
      # A function of (seed, step) alone, so that a resumed run draws the same numbers.
      rng = jax.random.fold_in(streams(config.seed)[1], old.step)
      (total, sums), grads = accumulated(old.trained, frozen, batch, rng)
    weight = sums.pop("weight")
    scale = 1.0 / weight  # the one division, after all parts and devices
    loss = total * scale
    grads = jax.tree.map(lambda g: g * scale, grads)
    norm = optax.tree.norm(grads)
    rate = schedule(old.step)
    updates, opt_state = optimizer.update(
      optimizers.clip_by_norm(grads, norm, config.clip_norm), old.opt_state, old.trained
    )
    moved = rate * optax.tree.norm(updates)
    trained = jax.tree.map(lambda p, u: p - rate * u, old.trained, updates)
    # The average starts as a plain mean, so that the random start is soon forgotten.
    decay = jnp.minimum(config.ema_decay, (1.0 + old.step) / (10.0 + old.step))
    ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, old.ema, trained) if config.ema_decay else {}

    good = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(moved)
    keep = lambda new, past: jax.tree.map(lambda n, p: jnp.where(good, n, p), new, past)
    bad = 1 - good.astype(jnp.int32)
    new = TrainState(
      step=old.step + 1,
      trained=keep(trained, old.trained),
      opt_state=keep(opt_state, old.opt_state),
      ema=keep(ema, old.ema),
      skipped=old.skipped + bad,
      skipped_in_row=(old.skipped_in_row + 1) * bad,
    )
    scalars = {"loss": loss, **{name: value * scale for name, value in sums.items()}}
    scalars |= {"learning_rate": rate, "grad_norm": norm, "update_norm": moved, "skipped": new.skipped}
    return new, scalars | {"skipped_in_row": new.skipped_in_row}

  return step
