"""The linear layer beside torch's: both timed in one process, interleaved, on random-normal data. The weights are copies that
together do not fit into a cache, taken in turn: a model has other weights in each layer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .. import ops
from ..ops import machine, reference
from . import timing
from .ffn import DTYPES

__all__ = ["SHAPES", "Report", "Row", "Settings", "run"]

SHAPES = {
    "q": (1536, 1536),
    "kv": (256, 1536),
    "head q": (2048, 2048),
    "7b q": (3584, 3584),
    "7b kv": (512, 3584),
}
"""N and K: queries, keys or values of Show-o2 1.5B, queries of its head, the same of 7B."""


@dataclass(frozen=True)
class Settings:
    """What is measured; see `flashu-ext bench linear --help`.

    Attributes:
        shapes: names of SHAPES. rows: numbers of tokens.
        epilogue: of ops.linear; torch applies it by an operator of its own.
        seconds: time to spend on each shape and number of rows.
    """

    shapes: tuple[str, ...] = ("q", "kv", "head q")
    dtype: str = "fp32"
    rows: tuple[int, ...] = (1, 16, 128, 512, 1460)
    epilogue: str = "none"
    seconds: float = 2.0
    threads: int | None = None
    seed: int = 0


@dataclass
class Row:
    """Medians of one shape and number of tokens, in microseconds."""

    shape: str
    rows: int
    torch_us: float
    linear_us: float


@dataclass
class Report:
    settings: Settings
    results: list[Row]
    machine: str
    command: str

    def table(self) -> str:
        lines = [
            f"linear with bias, {self.settings.dtype}, epilogue {self.settings.epilogue}: microseconds",
            f"{'shape':>8} {'N x K':>12} {'rows':>6} {'torch':>9} {'linear':>9} {'faster':>8} {'GFLOP/s':>9}",
        ]
        for row in self.results:
            n, k = SHAPES[row.shape]
            lines.append(
                f"{row.shape:>8} {f'{n} x {k}':>12} {row.rows:>6} {row.torch_us:>9.0f} {row.linear_us:>9.0f} "
                f"{row.torch_us / row.linear_us:>7.2f}x {2 * row.rows * n * k / row.linear_us / 1e3:>9.0f}"
            )
        return "\n".join([*lines, "", f"command: {self.command}", f"machine: {self.machine}"])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def run(settings: Settings) -> Report:
    """Measure every shape with every number of rows."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    results = []
    with torch.inference_mode():
        for shape, rows in itertools.product(settings.shapes, settings.rows):
            variants = _variants(settings, shape, rows)
            took = timing.measure(variants, torch.device("cpu"), settings.seconds, rounds=100_000).microseconds
            results.append(Row(shape, rows, took["torch"], took["linear"]))
    return Report(settings, results, machine.describe(), machine.command_line())


def _variants(settings: Settings, shape: str, rows: int) -> dict[str, Callable[[], Tensor]]:
    n, k = SHAPES[shape]
    dtype = DTYPES[settings.dtype]
    generator = torch.Generator().manual_seed(settings.seed)

    def randn(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * scale).to(dtype)

    copies = 1 + timing.flush_bytes(torch.device("cpu")) // (n * k * dtype.itemsize)
    x, weights, bias = randn(rows, k), randn(n, k, scale=k**-0.5).expand(copies, n, k).contiguous(), randn(n)

    def of(linear: Callable[..., Tensor]) -> Callable[[], Tensor]:
        turn = itertools.cycle(weights.unbind())
        return lambda: linear(x, next(turn), bias, epilogue=settings.epilogue)

    return {"torch": of(reference.linear), "linear": of(ops.linear)}
