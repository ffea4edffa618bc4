"""A transformer layer of the model as the runtime runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...ops.kernel_sets import KernelSet
from .adapters import RowAdapters
from .attention import HeadNorms
from .ffn import FFN
from .linear import Linear, Linears
from .norm import Norm

__all__ = ["Layer", "Projections"]


@dataclass(frozen=True)
class Projections:
    """The linear layers of an attention. A layer that drops tokens needs some of them for all tokens, others for a few."""

    module: Any
    """The model's attention."""
    kernels: KernelSet
    query: Linear
    value: Linear
    out: Linear
    query_key: Linears
    key_value: Linears
    query_key_value: Linears

    @classmethod
    def build(cls, module: Any, out: Any, kernels: KernelSet, like: Tensor, rows: RowAdapters) -> Projections:
        """Args:
        out: the output projection, which has a name of its own in every model.
        like: a weight of the model, for dtype and device.
        rows: the network's.
        """
        own = kernels, like, rows
        query, key, value = (Linear(each, *own) for each in (module.q_proj, module.k_proj, module.v_proj))
        return cls(
            module,
            kernels,
            query,
            value,
            Linear(out, *own),
            Linears((query, key), kernels),
            Linears((key, value), kernels),
            Linears((query, key, value), kernels),
        )


@dataclass(frozen=True)
class Layer:
    """A decoder layer of the language model, or a block of the diffusion head."""

    attention: Projections
    before_attention: Norm
    before_ffn: Norm
    ffn: FFN
    head_norms: HeadNorms | None = None
    """Of queries and keys, before rotation."""

    def normed_heads(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [rows, n, heads, d] under `head_norms`."""
        norms, kernels = self.head_norms, self.attention.kernels
        if norms is None:
            return query, key
        return kernels.rms_norm(query, norms.query, norms.eps), kernels.rms_norm(key, norms.key, norms.eps)
