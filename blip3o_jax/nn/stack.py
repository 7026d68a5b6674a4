"""Deep stacks of one block: one traced layer, whatever the depth, and rematerialisation by name."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.errors import UserError
from blip3o_jax.nn.target import target_platform
from blip3o_jax.types import Params

# What the backward pass finds saved and what it computes again, by name.
REMAT_POLICIES = {
  "none": None,  # everything is saved
  "full": jax.checkpoint_policies.nothing_saveable,  # the inputs of a block, and no more
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the products without batch dimensions as well
}

_SHALLOW = 16  # layers; deeper stacks take too long to compile one by one
_wanted = contextvars.ContextVar("written_out", default="")  # "loop" or "gradient"


@contextlib.contextmanager
def written_out(*, gradient: bool = False) -> Iterator[None]:
  """For tracing a gradient, or a loop over the parts of `for_loop`: on a CPU the layers of a shallow stack that lies
  whole on every device stand one after the other in the program, so that nothing is copied to and from stacked arrays.

  For a gradient those that save memory by computing again stay a loop: the compiler would see that it has it all
  already. Forward passes over many tokens, the samplers' too, gain nothing.
  """
  token = _wanted.set("gradient" if gradient else "loop")
  try:
    yield
  finally:
    _wanted.reset(token)


def _is_written_out(length: int, remat: str = "none") -> bool:
  shape = jax.sharding.get_abstract_mesh().shape
  whole = all(shape.get(axis, 1) == 1 for axis in ("fsdp", "tensor"))
  wanted = _wanted.get() == "loop" or (_wanted.get() == "gradient" and remat == "none")
  return wanted and length <= _SHALLOW and whole and target_platform() == "cpu"


def for_loop(params: Params) -> tuple[Any, Callable[[Any], Params]]:
  """(parts, whole): what a loop that reads all parameters for a few tokens keeps of them, and what makes them of it.

  On a CPU a pass would copy every layer out of its stack before it is used. So the parts are the layers one by one,
  copied once; the body calls `whole` on them and its model under `written_out`, and the compiler sees through both.
  """
  layer = lambda tree, i: jax.lax.optimization_barrier(jax.tree.map(lambda x: x[i], tree))
  apart = lambda tree: [layer(tree, i) for i in range(_depth(tree))]
  together = lambda trees: jax.tree.map(lambda *layers: jnp.stack(layers), *trees)
  with written_out():
    parts = _each_stack(params, lambda tree: apart(tree) if _is_written_out(_depth(tree)) else tree)
  return parts, lambda parts: _each_stack(parts, lambda tree: together(tree) if isinstance(tree, list) else tree)


def _each_stack(params: Params, change: Callable) -> Any:
  deeper = lambda tree: _each_stack(tree, change) if isinstance(tree, Mapping) else tree
  return {name: change(tree) if name == "layers" else deeper(tree) for name, tree in params.items()}


def _depth(stack: Params) -> int:
  return len(jax.tree.leaves(stack)[0])


def rematted(block: type[nn.Module], remat: str) -> type[nn.Module]:
  """`block` under the policy called `remat`.

  Raises:
    UserError: no such policy.
  """
  if remat not in REMAT_POLICIES:
    raise UserError(f"remat {remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}")
  return block if remat == "none" else nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)


def scan_layers(block: type[nn.Module], length: int, *, remat: str = "none", in_axes: Any = ()):
  """`block` scanned `length` times, parameters and sown intermediates stacked on axis 0 (logical name "layers").

  Args:
    block: its __call__(carry, *inputs) returns (carry, output of this layer).
    remat: a name of REMAT_POLICIES.
    in_axes: one entry an input: 0 (a slice a layer) or nn.broadcast.

  Returns:
    A module class with the fields of `block`.
  """
  return nn.scan(
    rematted(block, remat),
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    length=length,
    unroll=length if _is_written_out(length, remat) else 1,
    in_axes=in_axes,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
