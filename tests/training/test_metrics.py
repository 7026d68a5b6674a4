"""What a run writes down, on a disk and in a bucket."""

import jax.numpy as jnp
import pytest
from buckets import bucket
from etils import epath
from ml_collections import ConfigDict

from blip3o_jax.errors import UserError
from blip3o_jax.training import metrics
from blip3o_jax.training.defaults import claim, complete
from blip3o_jax.training.throughput import Timing


class Device:
  device_kind = "cpu"


def log_of(workdir, start=0):
  settings = {"start": start, "steps": 9, "every": 1, "batch_size": 4, "max_bad": 3}
  return metrics.MetricLog(workdir, Timing(workdir), [Device()], **settings)


def scalars(loss):
  return {"loss": jnp.float32(loss), "skipped": jnp.int32(0), "skipped_in_row": jnp.int32(0)}


def test_a_bucket_holds_what_a_disk_does(tmp_path):
  with bucket() as files:
    for workdir in (epath.Path(tmp_path / "run"), epath.Path("gs://somewhere/run")):
      config = complete(ConfigDict({"steps": 9}))
      claim(workdir, config, write=True)
      with pytest.raises(UserError, match="steps was 9, is 8"):
        claim(workdir, complete(ConfigDict({"steps": 8})), write=False)
      log = log_of(workdir)
      for step in (1, 2, 3):
        log.add(step, scalars(step / 2))
      log.put()
      log.close()
      again = log_of(workdir, start=2)  # step 3 was lost with the machine
      again.add(3, scalars(7))
      again.put()
      again.close()
      lines = metrics.read(workdir / "metrics.jsonl")
      assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 7.0)]
      assert {path.name for path in workdir.iterdir()} == {"config.json", "metrics.jsonl", "began.txt"}
    assert files.exists("gs://somewhere/run/metrics.jsonl")
