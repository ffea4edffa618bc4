"""The latent encoder and decoder: ConvNeXt blocks around the language model, conditioned on the time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..embedding import sinusoids
from ..norms import RMSNorm
from .config import JanusFlowConfig

__all__ = ["LatentDecoder", "LatentEncoder", "ResponseNorm"]


class TimeEmbed(nn.Module):
    """Times [rows], 0 to 1000 -> [rows, hidden]."""

    def __init__(self, waves: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(waves, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        waves = sinusoids(t, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResponseNorm(nn.Module):
    """Global response norm over an image's height and width: x [rows, H, W, width] -> the same.

    Source: ConvNeXt V2 (arXiv 2301.00808).
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # A square root of a sum would have no gradient where a channel is 0 everywhere.
        response = torch.linalg.vector_norm(x.float(), dim=(1, 2), keepdim=True)
        relative = (response / (response.mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype)
        return self.bias + (self.weight * relative + 1) * x


class LatentBlock(nn.Module):
    """x [rows, H, W, width], the time's embedding [rows, hidden] -> the same shape as x."""

    def __init__(self, width: int, config: JanusFlowConfig):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.norm = RMSNorm(width, config.uvit_norm_eps)
        self.channelwise_linear_1 = nn.Linear(width, 4 * width)
        self.channelwise_norm = ResponseNorm(4 * width, config.grn_eps)
        self.channelwise_linear_2 = nn.Linear(4 * width, width)
        self.cond_embeds_mapper = nn.Linear(config.hidden, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        mixed = self.norm(self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        raised = self.channelwise_norm(F.gelu(self.channelwise_linear_1(mixed)))
        x = x + self.channelwise_linear_2(raised)
        # The time modulates the sum, not the branch.
        scale, shift = self.cond_embeds_mapper(F.silu(time))[:, None, None].chunk(2, dim=-1)
        return x * (1 + scale) + shift


class LatentBlocks(nn.Module):
    def __init__(self, width: int, config: JanusFlowConfig):
        super().__init__()
        self.res_blocks = nn.ModuleList(LatentBlock(width, config) for _ in range(config.blocks))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x, time)
        return x


class LatentEncoder(nn.Module):
    """Latents [rows, channels, 2g, 2g] and a time's embedding -> image tokens [rows, g * g, width], raster order."""

    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.time_embed = TimeEmbed(config.channels, config.hidden)
        self.in_conv = nn.Conv2d(config.latent_channels, config.channels, kernel_size=2, stride=2)
        self.mid_block = LatentBlocks(config.channels, config)

    def forward(self, latents: Tensor, time: Tensor) -> Tensor:
        return self.mid_block(self.in_conv(latents).permute(0, 2, 3, 1), time).flatten(1, 2)


class Unpatch(nn.Module):
    """x [rows, H, W, width] -> [rows, channels, 2 H, 2 W]."""

    def __init__(self, width: int, config: JanusFlowConfig):
        super().__init__()
        self.norm = RMSNorm(width, config.uvit_norm_eps)
        self.unpatch_conv = nn.Conv2d(width, 4 * config.latent_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.unpatch_conv(self.norm(x).permute(0, 3, 1, 2)), 2)


class LatentDecoder(nn.Module):
    """The language model's output [rows, g * g, width], the encoder's of the same tokens, and a time's embedding -> velocity
    [rows, channels, 2g, 2g]."""

    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        width = 2 * config.channels
        self.input_norm = RMSNorm(config.channels, config.uvit_norm_eps)
        self.mid_block = LatentBlocks(width, config)
        self.out_convs = nn.ModuleList([Unpatch(width, config)])

    def forward(self, hidden: Tensor, encoded: Tensor, time: Tensor) -> Tensor:
        side = round(hidden.shape[1] ** 0.5)
        x = torch.cat([self.input_norm(hidden), encoded], dim=-1).unflatten(1, (side, side))
        return self.out_convs[0](self.mid_block(x, time))
