"""The diffusion head in plain torch: llama3-scaled RoPE, modulated attention blocks, final layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..norms import RMSNorm
from .config import HeadConfig

__all__ = ["FinalLayer", "ModulatedAttentionBlock"]

# Constants of the published head (upstream DiffusionHeadConfig).
NORM_EPS = 1e-5
ROPE_THETA = 5e5
ROPE_FACTOR, ROPE_LOW, ROPE_HIGH, ROPE_ORIGINAL_LENGTH = 32.0, 1.0, 4.0, 8192


class RotaryEmbedding(nn.Module):
    """cos and sin tables with llama3 frequency scaling: long wavelengths are stretched by ROPE_FACTOR, short ones unchanged."""

    inv_freq: Tensor

    def __init__(self, head_dim: int):
        super().__init__()
        frequency = 1.0 / (ROPE_THETA ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        wavelength = 2 * math.pi / frequency
        smooth = (ROPE_ORIGINAL_LENGTH / wavelength - ROPE_LOW) / (ROPE_HIGH - ROPE_LOW)
        between = (1 - smooth) * frequency / ROPE_FACTOR + smooth * frequency
        scaled = torch.where(wavelength > ROPE_ORIGINAL_LENGTH / ROPE_LOW, frequency / ROPE_FACTOR, between)
        scaled = torch.where(wavelength < ROPE_ORIGINAL_LENGTH / ROPE_HIGH, frequency, scaled)
        self.register_buffer("inv_freq", scaled, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [rows, n] -> cos and sin [rows, n, head_dim] in x's dtype."""
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.head_dim = config.head_dim
        inner, kv_inner = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)
        self.rotary_emb = RotaryEmbedding(config.head_dim)

    def forward(self, x: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        """x [rows, n, width], mask additive [rows, 1, n, n], position_ids [rows or 1, n] -> [rows, n, width]."""
        rows, n, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(rows, n, -1, self.head_dim).transpose(1, 2)

        query, key, value = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        cos, sin = (table[:, None] for table in self.rotary_emb(x, position_ids))
        query, key = _rotate(self.q_norm(query), cos, sin), _rotate(self.k_norm(key), cos, sin)
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(rows, n, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, inside: Tensor) -> Tensor:
    """x * (1 + scale) + shift in fp32 where `inside` [rows, n, 1]; shift, scale [rows, width]; x elsewhere."""
    wide = x.float()
    return torch.where(inside, wide * (1 + scale.float()[:, None]) + shift.float()[:, None], wide).to(x.dtype)


class ModulatedAttentionBlock(nn.Module):
    """Transformer block whose image span is modulated by the time embedding (adaLN); text rows pass unmodulated."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, NORM_EPS)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, NORM_EPS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def forward(self, x: Tensor, time: Tensor, mask: Tensor, position_ids: Tensor, inside: Tensor) -> Tensor:
        """x [rows, n, width], time [rows, width], inside bool [rows, n, 1] -> [rows, n, width]."""
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = self.adaLN_modulation(time).chunk(6, dim=1)
        one = x.new_ones(())
        y = modulate(self.input_layernorm(x), shift_attn, scale_attn, inside)
        x = x + torch.where(inside, gate_attn[:, None], one) * self.self_attn(y, mask, position_ids)
        y = modulate(self.post_attention_layernorm(x), shift_ffn, scale_ffn, inside)
        return x + torch.where(inside, gate_ffn[:, None], one) * self.mlp(y)


class FinalLayer(nn.Module):
    """Modulated norm and projection to velocity rows [.., patch * patch * channels]."""

    def __init__(self, width: int, patch_size: int, channels: int):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [rows, tokens of the span, width], time [rows, width]."""
        shift, scale = self.adaLN_modulation(time).chunk(2, dim=1)
        inside = torch.ones((), dtype=torch.bool, device=x.device)
        return self.linear(modulate(self.norm_final(x), shift, scale, inside))
