"""For what a program is compiled, where platforms want the same mathematics written in different ways.

It is the platform of the mesh in context (`jax.set_mesh`), so that a program compiled ahead of time for a TPU on
another machine is the one that runs there.
"""

import jax


def target_platform() -> str:
  """ "tpu", "gpu" or "cpu": of the mesh in context if there is one, else of the default device."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  # The name of the kind, since older versions of JAX do not tell the platform.
  return "tpu" if device.device_kind.startswith("TPU") else "cpu" if device.device_kind == "cpu" else "gpu"
