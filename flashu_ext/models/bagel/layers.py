"""The language model: a Qwen2 in whose layers text and latents have experts of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import RMSNorm
from .config import BagelConfig

__all__ = ["Context", "DecoderLayer", "Experts", "LanguageModel"]


@dataclass(frozen=True)
class Experts:
    """Which tokens of a block the drawing expert computes: those from `first` up to `last`; the text expert computes the rest."""

    first: int = 0
    last: int = 0

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., n, width] -> the text expert's tokens, the drawing expert's."""
        return torch.cat([x[..., : self.first, :], x[..., self.last :, :]], dim=-2), x[..., self.first : self.last, :]

    def joined(self, text: Tensor, drawn: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([text[..., : self.first, :], drawn, text[..., self.first :, :]], dim=-2)


@dataclass(frozen=True)
class Context:
    """What a query block attends to: rotated keys and values of every layer. Appending makes another one.

    Attributes:
        keys, values: for each layer [1, kv heads, tokens, d].
        position: of the next token. An image has one position.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    position: int = 0

    @property
    def length(self) -> int:
        return self.keys[0].shape[-2] if self.keys else 0


class Attention(nn.Module):
    """Attention whose projections and head norms each expert has for itself; the softmax is over all tokens."""

    def __init__(self, config: BagelConfig):
        super().__init__()
        hidden, self.head_dim = config.hidden, config.hidden // config.heads
        for suffix in ("", "_moe_gen"):
            for name, heads in (("q", config.heads), ("k", config.kv), ("v", config.kv)):
                setattr(self, f"{name}_proj{suffix}", nn.Linear(hidden, heads * self.head_dim))
            setattr(self, f"o_proj{suffix}", nn.Linear(hidden, hidden, bias=False))
            for name in ("q_norm", "k_norm"):
                setattr(self, f"{name}{suffix}", RMSNorm(self.head_dim, config.eps))

    def project(self, x: Tensor, suffix: str) -> list[Tensor]:
        """x [..., n, hidden] -> query, key and value [..., heads, n, d] of an expert, before rotation."""
        wide = [getattr(self, f"{name}_proj{suffix}")(x).unflatten(-1, (-1, self.head_dim)) for name in "qkv"]
        of = [each.transpose(-3, -2) for each in wide]
        return [getattr(self, f"q_norm{suffix}")(of[0]), getattr(self, f"k_norm{suffix}")(of[1]), of[2]]


class MLP(nn.Module):
    def __init__(self, config: BagelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.inter, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.inter, bias=False)
        self.down_proj = nn.Linear(config.inter, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: BagelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp, self.mlp_moe_gen = MLP(config), MLP(config)
        for suffix in ("", "_moe_gen"):
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(self, f"{name}{suffix}", RMSNorm(config.hidden, config.eps))

    def forward(
        self,
        x: Tensor,
        experts: Experts,
        rope: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
        allowed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block of tokens.

        Args:
            x: [rows, n, hidden].
            rope: cos and sin that rows and heads share, or [rows, 1, n, d].
            past: keys and values [rows, kv heads, m, d].
            allowed: bool [..., n, m + n], what a token attends to; None: all.

        Returns:
            x after the layer, and its keys and values [rows, kv heads, n, d].
        """
        attention, both = self.self_attn, ("", "_moe_gen")
        normed = [
            getattr(self, f"input_layernorm{suffix}")(own) for suffix, own in zip(both, experts.split(x), strict=True)
        ]
        projected = [attention.project(own, suffix) for suffix, own in zip(both, normed, strict=True)]
        query, key, value = (experts.joined(*pair) for pair in zip(*projected, strict=True))
        query, key = (_rotated(each, rope) for each in (query, key))
        keys, values = (
            (key, value) if past is None else (torch.cat(pair, -2) for pair in zip(past, (key, value), strict=True))
        )
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=allowed, enable_gqa=True)
        attended = attended.transpose(-3, -2).flatten(-2)
        out = [
            getattr(attention, f"o_proj{suffix}")(own)
            for suffix, own in zip(both, experts.split(attended), strict=True)
        ]
        x = x + experts.joined(*out)
        fed = [
            getattr(self, f"mlp{suffix}")(getattr(self, f"post_attention_layernorm{suffix}")(own))
            for suffix, own in zip(both, experts.split(x), strict=True)
        ]
        return x + experts.joined(*fed), key, value


def _causal(n: int, past: int, device: torch.device) -> Tensor:
    """Bool [n, past + n]: all of the past, and within the block what is not later."""
    return torch.ones(n, past + n, dtype=torch.bool, device=device).tril(past)


def _rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., heads, n, d] by cos and sin [..., n, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]


class Rotary(nn.Module):
    """cos and sin [rows, n, d] for position_ids [rows, n]."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, base: float):
        super().__init__()
        frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x: for its dtype."""
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Stack(nn.Module):
    """The layers, with a final norm for each expert."""

    layers: Any

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)
        self.norm_moe_gen = RMSNorm(config.hidden, config.eps)
        self.rotary_emb = Rotary(config.hidden // config.heads, config.rope_theta)

    def forward(self, x: Tensor, experts: Experts, context: Context, causal: bool, step: int) -> tuple[Tensor, Context]:
        """A block of tokens after a context.

        Args:
            x: [n, hidden].
            causal: within the block a token attends to earlier ones only.
            step: of the position from token to token: 1 for text, 0 for an image.

        Returns:
            Hidden states [n, hidden] before the experts' final norms, and the context with the block in it.
        """
        steps = torch.arange(len(x), device=x.device) * step
        rope = self.rotary_emb(x, context.position + steps)
        allowed = _causal(len(x), context.length, x.device) if causal else None
        keys, values = [], []
        x = x[None]
        for index, layer in enumerate(self.layers):
            past = (context.keys[index], context.values[index]) if context.keys else None
            x, key, value = layer(x, experts, rope, past, allowed)
            keys.append(key if past is None else torch.cat([past[0], key], dim=-2))
            values.append(value if past is None else torch.cat([past[1], value], dim=-2))
        after = context.position + (len(steps) if step else 1)
        return x[0], Context(tuple(keys), tuple(values), after)


class LanguageModel(nn.Module):
    """The stack with its output head, which may be the token embedding."""

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
