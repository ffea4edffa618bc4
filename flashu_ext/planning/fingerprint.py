"""Identifies a model by a sample of every weight, independent of the order of its FFN neurons."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .decoders import decoder_of
from .neurons import ffn_weights
from .safe_files import content_digest

__all__ = ["check_fingerprint", "model_fingerprint", "module_digest", "weights_digest"]

SAMPLES = 64
"""Elements sampled per tensor, evenly spaced."""

_MIX = -7046029254386353131  # 2^64 over the golden ratio, odd, as int64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PREFIX = "w2:"

Bits = Callable[[Tensor], Tensor]


def weights_digest(model: Any) -> str:
    """SHA-256 of every weight's name, shape, dtype and a sample of its bits.

    Acceleration reorders the neurons of the language model's FFNs. So one element of every neuron's gate, up and down weights
    is hashed, and the hashes are summed over the neurons.
    """
    return _digest(model, decoder_of(model).ffns, _bits, with_dtype=True)


def module_digest(module: Any) -> str:
    """`weights_digest` of a module that is no model of a family, such as a VAE."""
    return _digest(module, (), _bits, with_dtype=True)


def model_fingerprint(model: Any) -> str:
    """`weights_digest` of the values as bf16, so that a model cast to bf16 keeps its fingerprint."""
    ffns = decoder_of(model).ffns
    return _PREFIX + _digest(model, ffns, lambda values: _bits(values.to(torch.bfloat16)), with_dtype=False)


def check_fingerprint(model: Any, expected: str) -> str | None:
    """A model's fingerprint where it differs from the expected one, else None. Plans of earlier versions have a digest of
    attention weights only."""
    actual = model_fingerprint(model) if expected.startswith(_PREFIX) else _attention_digest(model)
    return None if actual == expected else actual


@torch.no_grad()
def _digest(model: Any, ffns: Sequence[Any], bits: Bits, with_dtype: bool) -> str:
    own = {id(weight): weight for ffn in ffns for weight in ffn_weights(ffn)}
    named = {
        name.replace(".base_layer.", "."): value
        for name, value in model.named_parameters(remove_duplicate=False)
        if not any(part.startswith("lora_") for part in name.split("."))  # peft's, which leave the base as it is
    }
    spread = [_spread(value, bits) for value in named.values() if id(value) not in own and _readable(value)]
    neurons = [_neurons(ffn, bits) for ffn in ffns if all(map(_readable, ffn_weights(ffn)))]
    sampled = torch.cat([each.cpu() for each in (*spread, *neurons)])
    digest = hashlib.sha256()
    for name, value in named.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype if with_dtype else ''};".encode())
    digest.update(sampled.numpy().tobytes())
    return digest.hexdigest()


def _readable(value: Any) -> bool:
    """Whether a weight has values to sample: not on meta, nor in a quantizer's tensor."""
    return type(value) in (Tensor, torch.nn.Parameter) and value.device.type != "meta"


def _bits(values: Tensor) -> Tensor:
    """The bits of numbers of any dtype, as int64."""
    return values.contiguous().view(_BITS[values.element_size()]).long()


def _spread(value: Tensor, bits: Bits) -> Tensor:
    """Bits of `SAMPLES` to 2 * `SAMPLES` - 1 evenly spaced elements, or of all elements of a smaller tensor."""
    flat = value.detach().flatten()
    return bits(flat[:: max(1, flat.numel() // SAMPLES)])


def _neurons(ffn: Any, bits: Bits) -> Tensor:
    """A hash int64 [1] of an FFN's neurons, the same for any order."""
    gate, up, down = (weight.detach() for weight in ffn_weights(ffn))
    middle = gate.shape[1] // 2
    mixed = torch.zeros((), dtype=torch.int64, device=gate.device)
    for column in (gate[:, middle], up[:, middle], down[middle]):
        mixed = (mixed + bits(column) + 1) * _MIX
        mixed = mixed ^ (mixed >> 29)
    return mixed.sum(0, keepdim=True)


def _attention_digest(model: Any) -> str:
    sample: list[Tensor] = []
    shapes: list[int] = []
    for layer in decoder_of(model).layers:
        shapes += list(layer.mlp.down_proj.weight.shape)
        query = layer.self_attn.q_proj.weight.detach().flatten()
        sample += [layer.post_attention_layernorm.weight, query[:: max(1, query.numel() // 256)]]
    return content_digest([torch.tensor(shapes, dtype=torch.float32, device="cpu"), *sample])
