"""Operations and numbers moved by each op in one run of a phase, from shapes alone: predictions, nothing is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .cost import LayerShape

__all__ = ["OP_COSTS", "OpCost", "PhaseShape"]


@dataclass(frozen=True)
class PhaseShape:
    """What one run of a phase computes: an evaluation of an image, a prompt, or a token of an answer.

    Attributes:
        layer: its transformer layers' sizes.
        layers: how many of them run.
        rows: of the batch.
        queries: tokens per row that are computed.
        keys: that a query attends to.
        neurons: of the FFN that are computed.
        norms: RMSNorms that run by themselves.
        others: (rows, operations per row) of linear layers outside of the transformer layers.
        velocity: numbers of a row's output, (patches, each).
        tables: of differences that the head's cache has.
    """

    layer: LayerShape
    layers: int
    rows: int
    queries: int
    keys: int
    neurons: int = 0
    norms: int = 1
    others: tuple[tuple[int, float], ...] = ()
    velocity: tuple[int, int] = (0, 0)
    tables: int = 1

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.queries

    @property
    def state(self) -> int:
        """Numbers of a hidden state of all tokens."""
        return self.tokens * self.layer.width


@dataclass(frozen=True)
class OpCost:
    """An op's cost in one run of a phase, all its calls together.

    Attributes:
        shape: of one call, or of most of them, in words.
        flops: of matrix products and attention; 0 for ops that memory alone bounds.
        values: numbers read or written, weights included, each once per call.
    """

    shape: str
    flops: float
    values: float


def _moves(times: Callable[[PhaseShape], float]) -> Callable[[PhaseShape], OpCost]:
    """The cost of an op that reads or writes the hidden state so many times."""
    return lambda p: OpCost(f"{p.rows} x {p.queries} x {p.layer.width}", 0.0, times(p) * p.state)


def _gathered_ffn(p: PhaseShape) -> OpCost:
    width = p.layer.width
    return OpCost(
        f"{p.rows} x {p.queries} x {width}, {p.neurons} neurons",
        p.layers * 6.0 * p.tokens * width * p.neurons,
        p.layers * (3.0 * width * p.neurons + 3.0 * p.state),
    )


def _linears(p: PhaseShape) -> OpCost:
    width = p.layer.width
    out = p.layer.heads * p.layer.head_dim + 2 * p.layer.key_value_width
    return OpCost(
        f"{p.rows} x {p.queries} x {width} -> {out}",
        p.layers * 2.0 * p.tokens * width * out,
        p.layers * (width * out + p.state + p.tokens * out),
    )


def _linear(p: PhaseShape) -> OpCost:
    """Output projections, and the other linear layers, of which the weights alone are counted as moved."""
    width, heads = p.layer.width, p.layer.heads * p.layer.head_dim
    flops = p.layers * 2.0 * p.tokens * width * heads
    values = p.layers * (width * heads + p.tokens * heads + 2.0 * p.state)
    return OpCost(
        f"{p.rows} x {p.queries} x {heads} -> {width}",
        flops + sum(rows * each for rows, each in p.others),
        values + sum(each / 2 for _, each in p.others),
    )


def _attention(p: PhaseShape) -> OpCost:
    heads = p.layer.heads * p.layer.head_dim
    return OpCost(
        f"{p.rows} x {p.layer.heads} x {p.queries} x {p.layer.head_dim}, {p.keys} keys",
        p.layers * p.rows * p.layer.products(p.queries, p.keys),
        p.layers * 2.0 * (p.tokens * heads + p.rows * p.keys * p.layer.key_value_width),
    )


def _rotary(p: PhaseShape) -> OpCost:
    heads = p.layer.heads * p.layer.head_dim + 2 * p.layer.key_value_width
    return OpCost(f"{p.rows} x {p.queries} x {heads}", 0.0, p.layers * 2.0 * p.tokens * heads)


def _value_norms(p: PhaseShape) -> OpCost:
    width = p.layer.key_value_width
    return OpCost(f"{p.rows} x {p.queries} x {width}", 0.0, float(p.tokens * width))


def _topk(p: PhaseShape) -> OpCost:
    return OpCost(f"{p.rows} x {p.queries}", 0.0, 2.0 * p.tokens)


def _euler(p: PhaseShape) -> OpCost:
    patches, each = p.velocity
    return OpCost(f"{p.rows} x {patches} x {each}", 0.0, 2.0 * p.rows * patches * each)


OP_COSTS: Mapping[str, Callable[[PhaseShape], OpCost]] = {
    "gathered_ffn": _gathered_ffn,
    "linear": _linear,
    "linears": _linears,
    "attention": _attention,
    "cosine_importance": _moves(lambda p: 2 * p.layers),
    "value_norms": _value_norms,
    "select_topk": _topk,
    "gather_rows": _moves(lambda p: 2),
    "scatter_rows_": _moves(lambda p: 2),
    "rms_norm": _moves(lambda p: 2 * p.norms),
    "add_rms_norm_": _moves(lambda p: 4 * p.layers),
    "gate_add_": _moves(lambda p: 6 * p.layers),
    "rotary_cache_": _rotary,
    "guided_euler_step_": _euler,
    "feature_delta": _moves(lambda p: 2),
    "taylor_update_": _moves(lambda p: 1 + 2 * p.tables),
    "taylor_predict": _moves(lambda p: 1 + p.tables),
}
"""The cost of every op that the runtime calls."""
