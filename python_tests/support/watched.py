"""What calibration is compared with: layers and FFNs of a dense model, watched by hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Measured", "Watched"]


class Watched:
    """Records what the layers and the FFNs of a task compute, over several calls: hidden states and activations in fp64."""

    def __init__(self, layers: Any, ffn: str, final_norm: Any, tokens: Callable[[Tensor], Tensor] = lambda x: x):
        self.layers, self.ffn, self.final_norm, self.tokens = layers, ffn, final_norm, tokens
        self.activations: list[list[Tensor]] = [[] for _ in layers]
        self.distances: list[list[Tensor]] = [[] for _ in layers]

    def __enter__(self) -> Watched:
        self.hooks = []
        for index, layer in enumerate(self.layers):
            down = getattr(layer, self.ffn).down_proj
            self.hooks.append(
                down.register_forward_pre_hook(lambda _m, a, i=index: self.activations[i].append(a[0].flatten(0, -2)))
            )
            self.hooks.append(layer.register_forward_hook(lambda _m, a, out, i=index: self._layer(i, a[0], out)))
        return self

    def _layer(self, index: int, before: Tensor, out: Any) -> None:
        after = out[0] if isinstance(out, tuple) else out
        after = self.final_norm(after) if index == len(self.layers) - 1 else after
        distance = 1 - torch.cosine_similarity(before, after, dim=-1)
        self.distances[index].append(self.tokens(distance.flatten()))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


@dataclass(frozen=True)
class Measured:
    """Sums over a task's tokens and importance of its layers, [rows, layers] of every sample."""

    activations: list[Tensor]
    importance: Tensor
    mean: Tensor

    @classmethod
    def of(cls, samples: list[list[Watched]], answer: int | None) -> Measured:
        layers = range(len(samples[0][0].layers))
        everything = [each for sample in samples for each in sample]
        activations = [torch.cat([x for each in everything for x in each.activations[i]]) for i in layers]
        values = [
            [[torch.cat(each.distances[i]) for i in layers] for each in sample] for sample in samples
        ]  # sample, row, layer
        means = torch.stack([torch.stack([torch.stack([x.mean() for x in row]) for row in s]) for s in values]).mean(0)
        if answer is None:
            return cls(activations, means, means)
        last = torch.stack([torch.stack([x[-1 - answer] for x in s[0]]) for s in values]).mean(0)
        return cls(activations, last[None], means)
