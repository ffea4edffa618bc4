"""Hashes a model's weights by a sample of every tensor, independent of the order of its FFN neurons."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["weights_digest"]

SAMPLES = 64
"""Elements sampled per tensor, evenly spaced."""

_MIX = -7046029254386353131  # 2^64 over the golden ratio, odd, as int64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_digest(model: Any) -> str:
    """SHA-256 of every weight's name, shape, dtype and a sample of its bits.

    Acceleration reorders the neurons of the language model's FFNs. So one element of every neuron's gate, up and down weights
    is hashed, and the hashes are summed over the neurons.
    """
    ffns = {f"showo.model.layers.{index}.mlp": layer.mlp for index, layer in enumerate(model.showo.model.layers)}
    own = {id(weight) for ffn in ffns.values() for weight in _matrices(ffn)}
    state = model.state_dict(keep_vars=True)
    spread = [_spread(value) for value in state.values() if id(value) not in own]
    sampled = torch.cat([*spread, *(_neurons(ffn) for ffn in ffns.values())]).cpu()
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
    digest.update(sampled.numpy().tobytes())
    return digest.hexdigest()


def _matrices(ffn: Any) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    return ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight


def _bits(values: Tensor) -> Tensor:
    """The bits of numbers of any dtype, as int64."""
    return values.contiguous().view(_BITS[values.element_size()]).long()


def _spread(value: Tensor) -> Tensor:
    """Bits of `SAMPLES` to 2 * `SAMPLES` - 1 evenly spaced elements, or of all elements of a smaller tensor."""
    flat = value.detach().flatten()
    return _bits(flat[:: max(1, flat.numel() // SAMPLES)])


def _neurons(ffn: Any) -> Tensor:
    """A hash int64 [1] of an FFN's neurons, the same for any order."""
    gate, up, down = (weight.detach() for weight in _matrices(ffn))
    middle = gate.shape[1] // 2
    mixed = torch.zeros((), dtype=torch.int64, device=gate.device)
    for column in (gate[:, middle], up[:, middle], down[middle]):
        mixed = (mixed + _bits(column) + 1) * _MIX
        mixed = mixed ^ (mixed >> 29)
    return mixed.sum(0, keepdim=True)
