"""A release read straight into sharded memory by two processes of one machine."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import tiny

from blip3o_jax.porting import model_dir
from blip3o_jax.porting.locate import convert_model, open_model

NAMES = ("backbone", "dit", "clip", "unet")
CHILD = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.experimental import multihost_utils
from blip3o_jax.porting.locate import open_model
from blip3o_jax.porting.source import abstract_params
from blip3o_jax.sharding.mesh import make_mesh

names = sys.argv[4:]
mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
source = open_model(sys.argv[3])
params = source.read(names, abstract_params(source.config(), names, mesh=mesh))
leaves = jax.tree.leaves(params)
held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
readers = {id(r): r for r in (getattr(w, "_reader", w) for w in source.weights.values())}
read = sum(r.bytes_read for r in readers.values())
total = [float(np.asarray(multihost_utils.process_allgather(leaf, tiled=True), np.float64).sum()) for leaf in leaves]
cut = sum(len(leaf.sharding.device_set) > 1 and not leaf.is_fully_replicated for leaf in leaves)
print(json.dumps({"held": held, "read": read, "cut": cut, "sums": total}))
"""


def test_each_process_reads_at_most_twice_what_it_holds(tmp_path):
  model_dir.write(tmp_path / "here", preset="micro", overrides=tiny.OVERRIDES, params=tiny.params())
  convert_model(tmp_path / "here", tmp_path / "release", format="safetensors")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  words = [sys.executable, "-c", CHILD, address]
  processes = [
    subprocess.Popen([*words, str(i), tmp_path / "release", *NAMES], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    for i in range(2)
  ]
  found = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]
  assert not any(process.returncode for process in processes)

  whole = jax.tree.leaves(open_model(tmp_path / "here").read(NAMES))
  for process in found:
    assert process["read"] <= 2 * process["held"] and process["cut"] > 20
    np.testing.assert_allclose(process["sums"], [np.asarray(x, np.float64).sum() for x in whole], rtol=1e-6, atol=1e-6)
