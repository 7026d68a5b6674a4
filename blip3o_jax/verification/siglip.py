"""SigLIP's vision tower: embeddings, outputs of single layers, both feature maps, and their poolings."""

import math

import jax

from blip3o_jax.errors import UserError
from blip3o_jax.models.siglip import Siglip, SiglipConfig, adaptive_pool
from blip3o_jax.verification.recording import Recording, load_params, nhwc, shapes, sown


def check(rec: Recording) -> None:
  reader = rec.weights()
  cfg = rec.build(SiglipConfig.from_reference, rec.config, shapes(reader))
  model = Siglip(cfg)
  image = nhwc(rec.input("pixel_values"))
  params = load_params("siglip", reader, model, image)

  out, state = jax.jit(lambda p, x: model.apply({"params": p}, x, mutable=["intermediates"]))(params, image)
  rec.compare("embeddings", sown(state, "embeddings"))
  layers = sown(state, "layers", "block_out")
  for name, layer in rec.matching(r"layer(\d+)_out"):
    if layer < cfg.layers:
      rec.compare(name, layers[layer])
  rec.compare("penultimate_layer_out", out.penultimate)
  rec.compare("last_layer_out_before_post_layernorm", layers[-1])
  rec.compare("last_hidden_state", out.last_hidden_state)
  if cfg.head:
    rec.compare("pooler_output", out.pooled)
  if "penultimate_pooled" in rec:
    tokens = rec.length("penultimate_pooled", 1)
    if math.isqrt(tokens) ** 2 != tokens:
      raise UserError(f"penultimate_pooled has {tokens} tokens, which is not a square")
    rec.compare("penultimate_pooled", adaptive_pool(out.penultimate, math.isqrt(tokens)))
