"""`blip3o data cache-features`: the CLIP features of every picture, once, to train from (DESIGN part 6.2).

The encoder is about half of the arithmetic of a training step of the release and always says the same of a picture.
Every process takes every so-many-th shard and works on its own devices alone, so processes need not keep step and wait
for each other but at the end; a shard that is there is never computed again, by whatever number of processes it was
begun.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.data import features
from blip3o_jax.data.features import Manifest
from blip3o_jax.data.outputs import differences, writable_folder
from blip3o_jax.data.sources import SourceConfig, open_source
from blip3o_jax.errors import UserError
from blip3o_jax.inference.encoding import Report, Squares, feature_shape, make_encoder, write_shards
from blip3o_jax.porting.locate import open_model
from blip3o_jax.porting.source import abstract_params
from blip3o_jax.sharding import distributed
from blip3o_jax.sharding.mesh import make_mesh


def run(
  model: str,
  data: str | Sequence[str],
  out: str | Path,
  *,
  resize: str = "crop",
  dtype: str = "bfloat16",
  fsdp: int = 1,
  batch_size: int = 64,
  shard_size: int = 4096,
  threads: int = 8,
) -> Report:
  """Cache the features of all pictures of `data` in `out`, or go on with it: the same command does both.

  Args:
    model: whose CLIP encoder; see porting.locate.open_model.
    data: one path or several, as data.sources.SourceConfig.path.
    resize: crop | squash, see transforms.square. dtype: of the arithmetic and of what is stored.
    fsdp: devices over which the encoder's weights are cut; whole on each they need not be sent (8.1 GiB of the 8B).
    batch_size: pictures at a time, a process. shard_size: pictures a file, which is what a kill can cost.
    threads: that read and decode.

  Raises:
    UserError: no encoder, no pictures, `out` holds features of another kind, or the devices do not divide as wished.
  """
  paths = (data,) if isinstance(data, str) else tuple(data)
  source, pictures = open_model(model), open_source(SourceConfig(paths))
  if "clip" not in source.components:
    raise UserError(
      f"{model} has no clip, the encoder whose features are cached; it has {', '.join(source.components)}"
    )
  mesh = make_mesh({"data": -1, "fsdp": fsdp}, batch_size=batch_size, devices=jax.local_devices())
  out, config = writable_folder(out), source.config()
  shape = feature_shape(config)
  encoder = features.identity(source.content_hash("clip"), config.clip, resize)
  manifest = Manifest(encoder, shape, dtype, list(paths), len(pictures), shard_size)
  claim(out, manifest)
  mine = manifest.shards[jax.process_index() :: jax.process_count()]
  todo = [(out / name, rows) for name, rows in mine if not (out / name).exists()]
  print(f"{len(mine) - len(todo)} of {len(mine)} shards are there already", flush=True)
  report = Report(0, 0, 0.0, 0)
  if todo:
    params = source.read(("clip",), abstract_params(config, ("clip",), jnp.dtype(dtype), mesh))
    encode = make_encoder(config, params, mesh, batch_size, dtype)
    order = np.concatenate([np.asarray(rows) for _, rows in todo])
    squares = Squares(pictures, order, config.clip.image_size, resize)
    report = write_shards(todo, squares, encode, batch_size=batch_size, threads=threads)
    print(f"{report.pictures} pictures, {report.bad} of them bad, {report.bytes / 1e6:,.1f} MB: {out}", flush=True)
  distributed.wait_for_all()
  return report


def claim(out: Path, manifest: Manifest) -> None:
  """Leave the manifest in `out`, or check that the one there is the same. Raises UserError if it is not."""
  if jax.process_index() == 0 and not (out / features.MANIFEST).exists():
    manifest.write(out)
  distributed.barrier("features manifest")
  there, ours = (dataclasses.asdict(x) for x in (features.read_manifest(out), manifest))
  if differing := differences(there | there.pop("encoder"), ours | ours.pop("encoder")).values():
    raise UserError(f"{out} holds other features ({'; '.join(differing)}); give another --out")
