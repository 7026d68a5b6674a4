"""What `--vs torch` measures beside ours: the release's own building blocks at the same work, with the same weights.

transformers' Qwen2.5-VL, diffusers' Lumina DiT, UNet2DConditionModel, AutoencoderKL and scheduler, and the EVA tower
(`eva`), which no library has. `rivals` opens them; it alone may be imported where torch is not installed.
"""
