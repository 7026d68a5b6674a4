"""Dense and convolution layers whose parameters carry logical axis names."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.target import target_platform

# A fan-in normal of variance 1/fan_in; torch_uniform below is the release's own initialisation.
default_init = nn.initializers.lecun_normal()
_NHWC = ("NHWC", "HWIO", "NHWC")


def torch_uniform():
  """torch's default: uniform in +-1/sqrt(fan_in) (torch.nn.Linear.reset_parameters)."""
  return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-2, out_axis=-1)


def with_whole(kernel: jax.Array, axes: Sequence[str | None], product: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """`product(kernel)`, of many rows or of pictures, with the kernel gathered along the axes that are cut for storage
  alone: over devices that share the batch as well.

  Left alone, a TPU's partitioner passes pieces of a kernel around and multiplies by one at a time, which fills its
  matrix units badly: 16.4 instead of 10.2 billion cycles for the 8B's pixels on four v5e, by its compiler's estimate.
  """
  rules, mesh = dict(nn.get_logical_axis_rules()), jax.sharding.get_abstract_mesh().shape
  cut = lambda name: rules.get(name) in rules.get("batch", ()) and mesh.get(rules[name], 1) > 1
  whole = tuple(None if cut(name) else jax.sharding.PartitionSpec.UNCONSTRAINED for name in axes)
  if None not in whole:
    return product(kernel)
  # A kernel's own gradient is not made whole: summed over those devices, each has its part to send on over slices.
  gather = jax.custom_jvp(lambda kernel: nn.with_logical_constraint(kernel, whole))
  gather.defjvp(lambda kernel, tangent: (gather(*kernel), *tangent))
  # Gathered once more for the gradient: else the forward pass would keep the whole kernels of all layers for it.
  return jax.checkpoint(lambda kernel: product(gather(kernel)), prevent_cse=False)(kernel)


class Dense(nn.Module):
  """y = x W + b over the last axis: [..., in] -> [..., features], in `dtype`.

  `axes` are the logical names of (in, out); the kernel is stored [in, out] in `param_dtype`.
  """

  features: int
  axes: tuple[str | None, str | None] = ("embed", "mlp")
  use_bias: bool = True
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  kernel_init: Any = default_init
  bias_init: Any = nn.initializers.zeros_init()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(self.kernel_init, self.axes),
      (x.shape[-1], self.features),
      self.param_dtype,
    )
    # As one matrix: the CPU back end takes the weight gradient of a [B, L, D] product three times slower than of this.
    rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
    # Of fewer rows, as those of the next token, the results may travel in place of the kernel.
    axes = self.axes if len(rows) >= x.shape[-1] else ()
    y = with_whole(kernel.astype(self.dtype), axes, lambda kernel: jnp.dot(rows, kernel))
    y = y.reshape(*x.shape[:-1], self.features)
    if self.use_bias:
      bias = self.param(
        "bias", nn.with_logical_partitioning(self.bias_init, self.axes[1:]), (self.features,), self.param_dtype
      )
      y = y + bias.astype(self.dtype)
    return y


class Conv(nn.Module):
  """2-D convolution, NHWC: [B, H, W, in] -> [B, H', W', features]; kernel [kh, kw, in, out].

  `padding` is the number of zeros on every side, or a pair per axis.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: int | Sequence[tuple[int, int]] = 1
  use_bias: bool = True
  axes: tuple[str | None, str | None] = ("conv_in", "conv_out")
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  kernel_init: Any = default_init

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    k = self.kernel_size
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(self.kernel_init, (None, None, *self.axes)),
      (k, k, x.shape[-1], self.features),
      self.param_dtype,
    )
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    y = with_whole(kernel, (None, None, *self.axes), lambda kernel: self._convolve(x, kernel))
    if self.use_bias:
      bias = self.param(
        "bias",
        nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:]),
        (self.features,),
        self.param_dtype,
      )
      y = y + bias.astype(self.dtype)
    return y

  def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    strides = (self.stride, self.stride)
    pad = [(self.padding, self.padding)] * 2 if isinstance(self.padding, int) else list(self.padding)
    return jax.lax.conv_general_dilated(x, kernel, strides, pad, dimension_numbers=_NHWC)


class UpsampleConv(Conv):
  """Nearest neighbour by 2, then a 3x3 convolution: [B, H, W, in] -> [B, 2H, 2W, features].

  Computed at the small size: of three neighbouring pixels of the large picture two are the same pixel of the small one,
  so each of four phases is a 2x2 convolution of sums of the kernel. The same result at 4/9 of the arithmetic.

  `size`: another (height, width) of the large picture, up to a pixel smaller on each side; None = twice the small one.
  """

  size: tuple[int, int] | None = None

  def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    if self.size not in (None, (2 * h, 2 * w)):
      large = x.repeat(2, axis=1).repeat(2, axis=2)[:, : self.size[0], : self.size[1]]
      return super()._convolve(large, kernel)
    # Sums of the kernel [4, 4, in, features]: every second row and column of them is what a phase sees.
    kernel = _taps(_taps(kernel.astype(jnp.float32), 0), 1).astype(self.dtype)
    if target_platform() == "tpu":
      # One convolution of the small picture with zeros between its pixels, which a TPU skips: 0.48 and 0.56 of the
      # cycles of stacked phases by its compiler's estimate (v5e, 64 x 64 x 640, 512 x 512 x 256).
      pad = [(2, 2), (2, 2)]
      return jax.lax.conv_general_dilated(x, kernel, (1, 1), pad, lhs_dilation=(2, 2), dimension_numbers=_NHWC)
    phases = kernel.reshape(2, 2, 2, 2, c, -1).transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, c, -1)
    # Padded beforehand: on a CPU, XLA swaps the operands of the kernel's gradient where the cotangent is larger than x,
    # and has no fast path for what that gives (15 times slower).
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = jax.lax.conv_general_dilated(x, phases, (1, 1), "VALID", dimension_numbers=_NHWC)
    # Every phase with zeros between its pixels, summed, rather than stacked: 3.9 ms and not 11.6 of 2 x 128 x 128 x 64
    # on two cores (but 0.32 and not 0.25 of 2 x 32 x 32 x 128).
    y, zero = y.reshape(b, h + 1, w + 1, 2, 2, -1), jnp.zeros((), y.dtype)
    place = lambda i, j: jax.lax.pad(
      y[:, i : i + h, j : j + w, i, j], zero, ((0, 0, 0), (i, 1 - i, 1), (j, 1 - j, 1), (0, 0, 0))
    )
    return place(0, 0) + place(0, 1) + place(1, 0) + place(1, 1)


def _taps(kernel: jax.Array, axis: int) -> jax.Array:
  """Three taps a, b, c on pixels of the large picture -> the four a, a + b, b + c, c on those of the small one."""
  first, middle, last = jnp.split(kernel, 3, axis=axis)
  return jnp.concatenate([first, first + middle, middle + last, last], axis=axis)


class DepthwiseConv(nn.Module):
  """Every channel convolved by itself, the size kept: [B, H, W, C] -> [B, H, W, C]; kernel [k, k, 1, C], k odd.

  Written as a sum of shifted products, which fuse into one loop: on the CPU back end ten times faster than a grouped
  convolution, and its gradient thirty times.
  """

  kernel_size: int = 3
  use_bias: bool = True
  axis: str | None = "mlp"
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  kernel_init: Any = default_init

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    k, (_, h, w, c) = self.kernel_size, x.shape
    part = lambda init, *axes: nn.with_logical_partitioning(init, axes)
    init = part(self.kernel_init, None, None, None, self.axis)
    kernel = self.param("kernel", init, (k, k, 1, c), self.param_dtype).astype(self.dtype)
    x = jnp.pad(x.astype(self.dtype), ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    y = sum(x[:, i : i + h, j : j + w] * kernel[i, j, 0] for i in range(k) for j in range(k))
    if self.use_bias:
      bias = self.param("bias", part(nn.initializers.zeros_init(), self.axis), (c,), self.param_dtype)
      y = y + bias.astype(self.dtype)
    return y
