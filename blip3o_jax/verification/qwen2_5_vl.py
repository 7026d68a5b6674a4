"""Qwen2.5-VL: text batches, prompts with images, the vision tower's layers, greedy decoding."""

import re

import jax
import numpy as np

from blip3o_jax.data import vision
from blip3o_jax.errors import UserError
from blip3o_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig
from blip3o_jax.verification.recording import Recording, load_params, shapes, sown
from blip3o_jax.verification.text_decoder import check_group, groups


def check(rec: Recording) -> None:
  reader = rec.weights()
  cfg = rec.build(Qwen25VLConfig.from_reference, rec.config, shapes(reader))
  model = Qwen25VL(cfg)
  params = load_params("qwen2_5_vl", reader, model, method="touch")
  for prefix in groups(rec):
    _check_group(rec, prefix, model, params)


def _check_group(rec: Recording, prefix: str, model: Qwen25VL, params: dict) -> None:
  cfg = model.cfg
  tokens, mask = rec.input(f"{prefix}input_ids"), rec.input(f"{prefix}attention_mask").astype(bool)
  grids = np.zeros((len(tokens), 0, 3), np.int32)
  patches = None
  if ((tokens == cfg.image_token) & mask).any():
    source = _images_of(rec, prefix)
    rows = _share(tokens, mask, rec.input(f"{source}pixel_values"), rec.input(f"{source}image_grid_thw"), cfg)
    sizes = {"merge_size": cfg.vision.merge_size, "window_size": cfg.vision.window_size}
    patches = vision.pad_rows(rows, **sizes, patch_size=cfg.vision.patch_size)
    grids = patches["grid_thw"]
    if source == prefix:
      _check_vision(rec, prefix, model, params, patches)
  merge = cfg.vision.merge_size
  positions, deltas = vision.rope_index(tokens, mask, grids, image_token=cfg.image_token, merge_size=merge)
  rec.compare(f"{prefix}rope_deltas", deltas[:, None])
  check_group(rec, prefix, model, params, cfg.text.layers, positions, vision=patches, stack=("text", "layers"))


def _images_of(rec: Recording, prefix: str) -> str:
  """The prefix whose images a batch shows: its own, "mm:", or the only one that has any."""
  if f"{prefix}pixel_values" in rec:
    return prefix
  found = [name.removesuffix("pixel_values") for name in rec.names if name.rpartition(":")[2] == "pixel_values"]
  if "mm:" in found:
    return "mm:"
  if len(found) != 1:
    raise UserError(f"the input {prefix + 'pixel_values'!r} is absent; record it")
  return found[0]


def _share(tokens, mask, pixels, grids, cfg) -> list[tuple[np.ndarray, np.ndarray]]:
  """Give each row, in order, the images that its image tokens ask for: [(patches, grids)]."""
  counts = np.prod(grids, axis=-1)
  starts = np.concatenate([[0], np.cumsum(counts)])
  rows, image = [], 0
  for row, valid in zip(tokens, mask, strict=True):
    wanted, first = int((row[valid] == cfg.image_token).sum()) * cfg.vision.merge_size**2, image
    while wanted > 0 and image < len(grids):
      wanted -= int(counts[image])
      image += 1
    rows.append((pixels[starts[first] : starts[image]], grids[first:image]))
  return rows


def _check_vision(rec: Recording, prefix: str, model: Qwen25VL, params: dict, patches: dict) -> None:
  inputs = [patches[key] for key in ("patches", "patch_pos", "patch_image", "patch_window")]
  run = lambda p, *x: model.apply({"params": p}, *x, method="vision", mutable=["intermediates"])
  embeds, state = jax.jit(run)(params, *inputs)
  real = patches["patch_image"] >= 0  # row by row, the order of the recording
  merge = model.cfg.vision.merge_size**2
  rec.compare(f"{prefix}vision_embeds", np.asarray(embeds)[real[:, ::merge]])

  # The reference moves the patches of a window together; ours stay where they are.
  row = np.broadcast_to(np.arange(len(real))[:, None], real.shape)[real]
  order = np.lexsort((patches["patch_window"][real], row))
  blocks = sown(state, "vision", "layers", "block_out")[:, real][:, order]
  for name, layer in rec.matching(re.escape(prefix) + r"vision_block(\d+)_out_window_order"):
    if layer < len(blocks):
      rec.compare(name, blocks[layer])
  rec.compare(f"{prefix}vision_last_hidden_window_order", blocks[-1])
