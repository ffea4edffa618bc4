"""What this build is, and which kernels would serve a problem, as text for people. No tensor is needed."""

from __future__ import annotations

from .common import call, torch_ops

__all__ = ["build_facts", "explain_ffn", "explain_gemm"]


def build_facts() -> dict[str, str]:
    """What this build is: version, ABI version, compiler, CUDA kernels (on, or why they are off), CPU instruction set in use."""
    lines = call(torch_ops.build_facts.default).splitlines()
    return dict(line.split("\t", 1) for line in lines)


def explain_gemm(m: int, n: int, k: int, dtype: str, gathered: bool, threads: int = 0) -> str:
    """A table of how [m, k] x [k, n] may be blocked on this CPU, with predicted costs, the choice first.

    Args:
        dtype: "fp32", "bf16" or "fp16".
        gathered: rows of the second operand are gathered by an index list.
        threads: 0 means all of torch's.

    Raises:
        ValueError: a size is negative or the dtype is unknown.
    """
    return call(torch_ops.explain_gemm.default, m, n, k, dtype, gathered, threads)


def explain_ffn(
    rows: int, hidden: int, neurons: int, dtype: str, listed: bool, capability: int = 90, multiprocessors: int = 132
) -> str:
    """Which CUDA kernels would serve a gathered FFN of contiguous operands, with predicted costs, the choice first.

    Args:
        dtype: "fp32", "bf16" or "fp16".
        listed: the neurons come from an index list instead of one range.
        capability: 90 for sm_90; at least 80.

    Raises:
        ValueError: a size is negative, the dtype is unknown, or the device is too old.
    """
    return call(torch_ops.explain_ffn.default, rows, hidden, neurons, dtype, listed, capability, multiprocessors)
