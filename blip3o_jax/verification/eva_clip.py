"""EVA-CLIP's visual tower: features, their pooling, and activations of single layers."""

import jax
import numpy as np

from blip3o_jax.models.eva_clip import EvaClip, EvaClipConfig, pool
from blip3o_jax.verification.recording import Recording, load_params, nhwc, shapes, sown


def check(rec: Recording) -> None:
  reader = rec.weights()
  cfg = rec.build(EvaClipConfig.from_reference, rec.config, shapes(reader))
  model = EvaClip(cfg)
  image = nhwc(rec.input("image"))
  params = load_params("clip", reader, model, image)

  features, state = jax.jit(lambda p, x: model.apply({"params": p}, x, mutable=["intermediates"]))(params, image)
  rec.compare("features", features)
  pooled = np.asarray(pool(features, cfg.pool_stride))
  side = cfg.side // cfg.pool_stride
  rec.compare("pooled", pooled.swapaxes(1, 2).reshape(*pooled.shape[::2], side, side))
  rec.compare("act_patch_embed", sown(state, "patches"))
  for pattern, name in ((r"act_block(\d+)_attn", "attention"), (r"act_block(\d+)_out_with_cls", "block_out")):
    for array, layer in rec.matching(pattern):
      if layer < cfg.layers:
        rec.compare(array, sown(state, "layers", name)[layer])
