"""Deep stacks of one block: one traced layer, whatever the depth, and rematerialisation by name."""

from typing import Any

import flax.linen as nn
import jax

from blip3o_jax.errors import UserError

# What the backward pass finds saved and what it computes again, by name.
REMAT_POLICIES = {
  "none": None,  # everything is saved
  "full": jax.checkpoint_policies.nothing_saveable,  # the inputs of a block, and no more
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the products without batch dimensions as well
}


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
    in_axes=in_axes,
    out_axes=out_axes,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
