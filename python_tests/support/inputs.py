"""Inputs of the op tests: sizes around every block size of the CPU kernels, and a different layout for every argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.guard import Guarded

CSRC = Path(__file__).parents[2] / "csrc"

# Each number with its source file and the text that defines it there; a test compares the two.
VECTORS = (4, 8, 16)  # floats of a vector, by instruction set
PANELS = (8, 16, 32)  # columns of a packed panel: two vectors
TILES = (6, 12)  # rows of a register tile
SUM_BLOCK = 32  # slots of K that are summed from zero; 64 numbers if bf16 is multiplied in pairs
K_BLOCKS = (128, 256, 384)  # slots of K that are packed together: streaming few rows, many, panels
ROW_BLOCKS = (96, 192)  # rows whose packed operand stays in L2
ROW_CHUNK = 1020  # rows that share one packing of the FFN's weights
KEY_BLOCK = 128  # keys that attention takes at a time
NORM_COLUMNS = 128  # neurons whose squares one thread sums
LANES = 8  # partial sums of a row
DELTA_CHUNK = 4096  # elements of a row that feature_delta sums at a time
GRAIN = 16384  # elements from which another thread is used

SAID = {
    "cpu/simd.hpp": ("kWidth = 16;", "kWidth = 8;", "kWidth = 4;"),
    "cpu/gemm_kernels.cpp": ("kTileRows = 12;", "kTileRows = 6;", "kColumns = 2 * kWidth;", "kStrip = 32;"),
    "cpu/gemm_kernels.hpp": ("kSumBlock = 32;",),
    "cpu/attention_kernels.hpp": ("kKeyBlock = 128;",),
    "core/tiles.cpp": (
        "kRowChunk = 1020;",
        "kLongPieceRows = 256;",
        "? 128 : 256;",
        "p.tile_rows)), 384, panels}",
        "{96, 192}",
    ),
    "cpu/neuron_norms.cpp": ("kColumns = 128;",),
    "cpu/routing_kernels.cpp": ("kLanes = 8;",),
    "cpu/norm_kernels.cpp": ("kLanes = 8;",),
    "cpu/step.cpp": ("kChunk = 4096;",),
    "cpu/op_support.hpp": ("kGrainElements = 16384;",),
}


def around(*edges: int) -> list[int]:
    """Sizes just below, at and above each edge, and the smallest ones."""
    return sorted({1, 2, 3} | {edge + beside for edge in edges for beside in (-1, 0, 1)})


ROWS = around(*TILES, *ROW_BLOCKS, ROW_CHUNK)
DEPTHS = around(*VECTORS, *PANELS, 2 * SUM_BLOCK, *K_BLOCKS, 2 * K_BLOCKS[-1])
WIDTHS = around(*VECTORS, *PANELS, 4 * PANELS[2], 8 * PANELS[2])


def tensors_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among a call's arguments."""
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def spread(
    arguments: dict[str, Any],
    turn: int = 0,
    *,
    contiguous: tuple[str, ...] = (),
    folding: tuple[str, ...] = (),
    strided: tuple[str, ...] = (),
) -> dict[str, Guarded]:
    """Every tensor of a call in guarded memory: same values, but each with its own padding and offset, so that an
    argument read with another's stride gives a wrong result.

    Args:
        turn: rotates the paddings; with 0 and 1 each argument is once wider and once narrower than its neighbour.
        contiguous: those that may not be padded. folding: those whose leading dimensions must fold into rows of one
            stride. strided: those whose last dimension may have any stride.
    """
    names = list(tensors_of(arguments))
    count, out = len(names), {}
    for place, name in enumerate(names):
        padding = 1 + (place if turn % 2 == 0 else count - place) * 2
        out[name] = Guarded(
            arguments[name],
            0 if name in contiguous else padding,
            gap=0 if name in contiguous or name in folding or turn == 0 else padding + 4,
            inner=2 + place % 2 if name in strided else 1,
            offset=place % 4 if turn == 0 else 3 - place % 4,
            odd_ones=True,
        )
    return out


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers, determined by the seed."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def integers(seed: int, *shape: int, dtype: torch.dtype, limit: int = 3) -> Tensor:
    """Small integers: exact in every dtype and in every order of summing."""
    return torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
