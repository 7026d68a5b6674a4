"""Deep stacks of one block: one traced layer, whatever the depth, and rematerialisation by name."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax

from blip3o_jax.errors import UserError
from blip3o_jax.nn.attention import target_platform

# What the backward pass finds saved and what it computes again, by name.
REMAT_POLICIES = {
  "none": None,  # everything is saved
  "full": jax.checkpoint_policies.nothing_saveable,  # the inputs of a block, and no more
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the products without batch dimensions as well
}

_SHALLOW = 16  # layers; deeper stacks take too long to compile one by one
_wanted = contextvars.ContextVar("written_out", default=False)


@contextlib.contextmanager
def written_out() -> Iterator[None]:
  """For tracing a gradient: on a CPU the layers of a shallow stack that lies whole on every device stand one after the
  other in the program, so that nothing is copied to and from stacked arrays. Samplers gain nothing, and decoding token
  by token loses by it.
  """
  token = _wanted.set(True)
  try:
    yield
  finally:
    _wanted.reset(token)


def _is_written_out(length: int) -> bool:
  shape = jax.sharding.get_abstract_mesh().shape
  whole = all(shape.get(axis, 1) == 1 for axis in ("fsdp", "tensor"))
  return _wanted.get() and length <= _SHALLOW and whole and target_platform() == "cpu"


def rematted(block: type[nn.Module], remat: str) -> type[nn.Module]:
  """`block` under the policy called `remat`.

  Raises:
    UserError: no such policy.
  """
  if remat not in REMAT_POLICIES:
    raise UserError(f"remat {remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}")
  return block if remat == "none" else nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)


def scan_layers(block: type[nn.Module], length: int, *, remat: str = "none", in_axes: Any = (), out_axes: Any = 0):
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
    unroll=length if _is_written_out(length) else 1,
    in_axes=in_axes,
    out_axes=out_axes,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
