"""The image encoder of questions: a SigLIP under timm's names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import JanusFlowConfig

__all__ = ["ImageEncoder"]


class PatchEmbed(nn.Module):
    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.vit, kernel_size=config.vit_patch, stride=config.vit_patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.vit, config.vit_ratio * config.vit)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.vit_ratio * config.vit, config.vit)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SelfAttention(nn.Module):
    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.heads = config.vit_heads
        self.qkv = nn.Linear(config.vit, 3 * config.vit)
        self.proj = nn.Linear(config.vit, config.vit)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.vit, config.vit_norm_eps)
        self.attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.vit, config.vit_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PoolMlp(nn.Module):
    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.vit, config.vit_ratio * config.vit)
        self.fc2 = nn.Linear(config.vit_ratio * config.vit, config.vit)


class AttentionPool(nn.Module):
    """In the checkpoint, but never run: questions read the patches."""

    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, config.vit))
        self.q = nn.Linear(config.vit, config.vit)
        self.kv = nn.Linear(config.vit, 2 * config.vit)
        self.proj = nn.Linear(config.vit, config.vit)
        self.norm = nn.LayerNorm(config.vit, config.vit_norm_eps)
        self.mlp = PoolMlp(config)


class VisionTower(nn.Module):
    """Pixels [images, 3, side, side] -> patch features [images, patches, width]."""

    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.vit_tokens, config.vit))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.vit_layers))
        self.norm = nn.LayerNorm(config.vit, config.vit_norm_eps)
        self.attn_pool = AttentionPool(config)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ImageEncoder(nn.Module):
    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.vision_tower = VisionTower(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vision_tower(pixels)
