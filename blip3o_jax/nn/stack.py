"""Deep stacks of one block: one traced layer, whatever the depth, and rematerialisation by name."""

from typing import Any

import flax.linen as nn
import jax

REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan_layers(block: type[nn.Module], length: int, *, remat: str = "none", in_axes: Any = (), out_axes: Any = 0):
  """`block` scanned `length` times, parameters and sown intermediates stacked on axis 0 (logical name "layers").

  Args:
    block: its __call__(carry, *inputs) returns (carry, output of this layer).
    remat: "none" | "full" (save block inputs only) | "dots" (save the products without batch dimensions as well).
    in_axes: one entry an input: 0 (a slice a layer) or nn.broadcast.

  Returns:
    A module class with the fields of `block`.
  """
  if remat != "none":
    block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
  return nn.scan(
    block,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    length=length,
    in_axes=in_axes,
    out_axes=out_axes,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
