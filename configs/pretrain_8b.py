"""Pretraining for image generation, 8B, in the form of the release: queries and DiT learn through frozen Qwen2.5-VL-7B.

blip3o convert --from Qwen/Qwen2.5-VL-7B-Instruct EVA_CLIP.safetensors RELEASE/diffusion-decoder --to start-8b
blip3o train --config configs/pretrain_8b.py --workdir runs/pretrain_8b

The release: 32 H200, 16 pictures each, about two weeks; then 0.83 on GenEval and 79 to 81 on DPG after instruction
tuning (configs/instruct_8b.py). Not run here at this size.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "seed": 42,
      "steps": 150_000,  # about two passes
      "batch_size": 512,
      "objective": "generation",
      "objective_args": {"drop": 0.1, "times": "discrete"},
      "model": {"preset": "blip3o-8b"},
      "trainable": ("dit/", "queries/"),
      "init_from": "start-8b",
      "data": {
        "task": "generation",
        # 27 M long captions (CC12M, SA-1B, JourneyDB; some 120 tokens), 5 M short ones (20 tokens), 4 M of JourneyDB:
        # every one of them is equally likely.
        "path": ("data/long-captions", "data/short-captions", "data/journeydb"),
        "image_size": 448,
        "resize": "crop",
        "max_length": 448,  # 512 less the 64 queries: the caption's tail is cut
        "form": "training",
        "wording": "release",
        "workers": 4,
      },
      "optimizer": {"name": "adamw", "learning_rate": 1e-4, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
      "schedule": {"name": "cosine_min", "min_ratio": 0.1, "warmup_ratio": 0.003},
      "clip_norm": 1.0,  # without it the release diverges after some 1,300 steps
      "compute_dtype": "bfloat16",
      "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
      "save_every": 1000,
      "keep": 1,
      "log_every": 1,
    }
  )
