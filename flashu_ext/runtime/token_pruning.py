"""Chooses the visual tokens that a prefill drops."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..models.adapter import Adapter
from ..ops.kernel_sets import KernelSet
from ..planning.config import FlashUConfig
from ..planning.groups import Answers
from .modules.attention import HeadNorms, rotated
from .modules.layer import Layer
from .prompt_cache import Span

__all__ = ["TokenPruner"]

RANDOM_SEED = 0


class TokenPruner:
    """Chooses visual tokens as a FlashUConfig says. `layer` is the layer that drops them; the number of layers if none does."""

    def __init__(self, parts: Adapter, config: FlashUConfig, kernels: KernelSet):
        self.parts = parts
        self.kernels = kernels
        answers = config.answers or Answers()
        self.ratio = answers.token_prune_ratio
        self.score = answers.token_prune_score
        self.layer = answers.token_prune_layer if self.ratio > 0 else len(parts.layers)

    @property
    def sees_question(self) -> bool:
        """Whether the choice depends on the text after the image: then another question cannot reuse the image."""
        return self.ratio > 0 and self.score == "attention"

    def dropped(self, spans: tuple[Span, ...]) -> tuple[int, ...]:
        """How many tokens of each span are dropped."""
        return tuple(int(count * self.ratio) for _, count in spans)

    def keep(self, scores: Tensor, count: int, drop: int) -> Tensor:
        """A span's tokens with the highest scores, ascending int64 [count - drop]; the first `count` scores are the span's."""
        span = scores[:count]
        if self.score == "random":
            # Drawn per span, so that an image keeps the same tokens in every prompt and batch.
            generator = torch.Generator("cpu").manual_seed(RANDOM_SEED)
            span = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu").to(scores.device)
        # NaN ranks lowest, so that a broken token cannot displace others.
        span = torch.nan_to_num(span, nan=float("-inf"))
        return self.kernels.select_topk(span, count - drop)[0]

    def scores(self, value: Tensor) -> Tensor:
        """Token scores fp32 [n] from values [1, n, kv_heads, d]; not for 'attention'."""
        norms = self.kernels.value_norms(value.transpose(1, 2))[0]
        return norms if self.score == "value_norm_small" else -norms

    def attention_scores(
        self, layer: Layer, normed: Tensor, rope: tuple[Tensor, Tensor], before: Tensor, visible: Tensor
    ) -> Tensor:
        """The last token's attention weight on each new token of its prompt, averaged over heads: fp32 [n].

        Args:
            layer: the one that drops tokens.
            normed: [1, n, hidden], the prompt's new tokens.
            rope: their rotary table, [1, n, d].
            before: rotated keys of earlier tokens, [kv_heads, m, d].
            visible: bool [m + n], where the last token may attend.
        """
        shape, kernels, attention, norms = self.parts.llm_attention, self.kernels, layer.attention, layer.head_norms
        of_key = None if norms is None else HeadNorms(norms.key, norms.key, norms.eps)
        query = attention.query(normed[:, -1:]).view(1, 1, shape.heads, shape.head_dim)
        key = attention.query_key.layers[1](normed).view(1, -1, shape.kv_heads, shape.head_dim)
        last = rotated(kernels, query, (rope[0][:, -1:], rope[1][:, -1:]), norms)
        keys = torch.cat([before, rotated(kernels, key, rope, of_key)[0]], dim=1).float()
        # A key's products do not depend on the others, nor the sum over heads on threads.
        queries = last.float().view(shape.kv_heads, -1, shape.head_dim)
        logits = torch.cat([kernels.linear(own, query).t() for own, query in zip(keys, queries, strict=True)])
        weights = torch.softmax((logits / shape.head_dim**0.5).masked_fill(~visible, float("-inf")), dim=-1)
        return functools.reduce(torch.add, weights.unbind())[before.shape[1] :] / shape.heads
