"""Logical axis name -> mesh axis. The only place that knows both."""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Parameters: kernels are cut once over `fsdp` and once over `tensor` (Megatron's columns and rows), never over `slice`.
# Activations: the batch over everything that is not `tensor`.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ("batch", ("slice", "data", "fsdp")),
  ("looked_up", ("slice", "data")),  # tokens whose embeddings are cut over `fsdp`
  ("length", None),
  ("act_embed", None),
  ("act_mlp", "tensor"),
  ("act_heads", "tensor"),
  ("embed", "fsdp"),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("vocab", "tensor"),
  ("conv_in", None),
  ("conv_out", "fsdp"),
  ("time", "fsdp"),
  ("queries", None),
  ("norm", None),
  ("layers", None),
)

_TABLE = dict(RULES)


def spec(mesh: Mesh, names: tuple[str | None, ...], shape: tuple[int, ...], layers: str | None = None) -> PartitionSpec:
  """The partition of one array. A mesh axis is used once (the first dimension wins) and only where it divides the size.

  layers: the mesh axis over which stacked layers are spread.

  Raises:
    ValueError: a name that RULES does not know (a typing slip in a model).
  """
  used: set[str] = set()
  parts = []
  for name, size in zip(names, shape, strict=True):
    if name is not None and name not in _TABLE:
      raise ValueError(f"logical axis {name!r} has no rule in sharding/rules.py")
    axes = (layers if name == "layers" else _TABLE.get(name)) or ()
    axes = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if a in mesh.shape and a not in used)
    if axes and size % math.prod(mesh.shape[a] for a in axes) == 0:
      used.update(axes)
      parts.append(axes if len(axes) > 1 else axes[0])
    else:
      parts.append(None)
  return PartitionSpec(*parts)


def shardings(mesh: Mesh, boxed: Any, layers: str | None = None) -> Any:
  """A NamedSharding for every leaf of a tree whose leaves may be boxed with logical names; unboxed ones replicate.

  `layers`: see `spec`. `boxed` is usually the result of `jax.eval_shape`. Returns the tree of `nn.unbox(boxed)`.
  """

  def one(leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return NamedSharding(mesh, PartitionSpec())
    if not jax.tree.leaves(leaf.value):  # optax masks a leaf that is another optimizer's business
      return leaf.value
    return NamedSharding(mesh, spec(mesh, leaf.names, leaf.value.shape, layers))

  return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def placed(mesh: Mesh, boxed: Any, layers: str | None = None) -> Any:
  """The tree of `nn.unbox(boxed)`, each leaf a ShapeDtypeStruct with its sharding; `layers`: see `spec`."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    nn.unbox(boxed),
    shardings(mesh, boxed, layers),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Every array of a batch is cut along its first axis."""
  return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in _TABLE["batch"] if axis in mesh.shape)))


def places(mesh: Mesh) -> int:
  """Into how many parts a batch is cut."""
  return math.prod(mesh.shape[axis] for axis in _TABLE["batch"] if axis in mesh.shape)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())
