"""Arrays and weights from here to torch and back."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import torch

from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.porting import convert, rules
from blip3o_jax.types import Params

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_ALIKE = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def tensor(x: Any) -> torch.Tensor:
  """An array on torch's device."""
  return _on_host(x).to(DEVICE)


def _on_host(x: Any) -> torch.Tensor:
  """A copy; bfloat16, which NumPy has not, through its bits."""
  x = np.array(jax.device_get(x), order="C")
  if x.dtype == jax.numpy.bfloat16:
    return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
  return torch.from_numpy(x)


def array(x: torch.Tensor) -> np.ndarray:
  """float32 on the host."""
  return x.detach().float().cpu().numpy()


def nchw(x: Any) -> torch.Tensor:
  """[B, H, W, C] -> [B, C, H, W]."""
  return tensor(x).permute(0, 3, 1, 2).contiguous()


def nhwc(x: torch.Tensor) -> np.ndarray:
  """[B, C, H, W] -> [B, H, W, C]."""
  return array(x.permute(0, 2, 3, 1))


def named(component: str, cfg: Blip3oConfig, tree: Params) -> Iterator[tuple[str, np.ndarray]]:
  """Our tree in the release's names and layouts, by the table that porting uses."""
  return convert.to_reference(rules.get(component, cfg), tree)


def build(make, dtype: str) -> torch.nn.Module:
  """`make()` on the device in `dtype`, not trained: no dropout, no gradients of its weights.

  Made in `dtype`, as `from_pretrained` does: a cast takes the memory of float32 first, and rounds the frequencies of
  rotary positions.
  """
  torch.set_default_dtype(_ALIKE[dtype])
  try:
    with torch.device(DEVICE):
      return make().eval().requires_grad_(False)
  finally:
    torch.set_default_dtype(torch.float32)


def load(module: torch.nn.Module, named: Iterable[tuple[str, Any]], unused: tuple[str, ...] = ()) -> torch.nn.Module:
  """Fill a module; each named array has its place, and all places but `unused` their array. Raises AssertionError."""
  # From the host: on the device all weights would lie twice.
  missing, unexpected = module.load_state_dict({key: _on_host(x) for key, x in named}, strict=False)
  left = [key for key in missing if not key.startswith(unused)]
  assert not left and not unexpected, f"not filled: {left[:3]}; no place: {unexpected[:3]}"
  return module


def finished(result: Any) -> Any:
  """The result, once the device has computed it."""
  if DEVICE == "cuda":
    torch.cuda.synchronize()
  return result
