"""EVA-CLIP-E/14+ as the release runs it (spec 5.2): post-norm blocks, one product for queries, keys and values, and
PyTorch's own fused attention, which computes what xformers does there."""

import torch
from torch import nn
from torch.nn import functional as F

from blip3o_jax.models.eva_clip import EvaClipConfig


class Attention(nn.Module):
  """[B, L, C] -> [B, L, C]."""

  def __init__(self, cfg: EvaClipConfig):
    super().__init__()
    self.heads = cfg.heads
    self.qkv, self.proj = nn.Linear(cfg.width, 3 * cfg.width), nn.Linear(cfg.width, cfg.width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    b, n, c = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
  """x + LN(attention(x)), then x + LN(MLP(x))."""

  def __init__(self, cfg: EvaClipConfig):
    super().__init__()
    self.attn = Attention(cfg)
    self.mlp = nn.ModuleDict({"fc1": nn.Linear(cfg.width, cfg.mlp_dim), "fc2": nn.Linear(cfg.mlp_dim, cfg.width)})
    self.norm1, self.norm2 = (nn.LayerNorm(cfg.width, eps=cfg.norm_eps) for _ in range(2))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = x + self.norm1(self.attn(x))
    return x + self.norm2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](x))))


class EvaClip(nn.Module):
  """Normalised pictures [B, 3, S, S] -> pooled features [B, N, C], under the release's names."""

  def __init__(self, cfg: EvaClipConfig):
    super().__init__()
    self.stride = cfg.pool_stride
    self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, cfg.width, cfg.patch_size, cfg.patch_size)})
    self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
    self.pos_embed = nn.Parameter(torch.zeros(1, 1 + cfg.side**2, cfg.width))
    self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))

  def forward(self, pixels: torch.Tensor) -> torch.Tensor:
    x = self.patch_embed["proj"](pixels)
    b, c, h, w = x.shape
    x = torch.cat([self.cls_token.expand(b, -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + self.pos_embed
    for block in self.blocks:
      x = block(x)
    x = x[:, 1:].transpose(1, 2).reshape(b, c, h, w)
    return F.avg_pool2d(x, self.stride).flatten(2).transpose(1, 2)
