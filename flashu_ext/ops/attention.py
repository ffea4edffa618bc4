"""Attention whose results depend on nothing but a query, its mask and the keys that it sees.

Storage is fp32, bf16 or fp16; arithmetic is fp32. Keys are taken in blocks from the first slot on, so a query has the same
bits in a batch or alone, among many queries or few, with any number of threads, in a longer or a shorter cache.

Errors: ValueError for shapes, strides, aliasing, devices and lengths, TypeError for dtypes, NotImplementedError on CUDA.
"""

from __future__ import annotations

from torch import Tensor

from .common import call_into, capability, fake, fake_out, torch_ops


@capability(devices=("cpu",))
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(query key^T / sqrt(d) + mask) value, rounded once at the end.

    A query's bits depend on its own numbers, its mask and the keys and values up to the last one that it sees.

    Args:
        query: [rows, heads, n, d].
        key: [rows, kv_heads, tokens, d]; head h uses kv head h // (heads // kv_heads). Any strides but the last, which is
            1: a transposed view of a cache is read where it lies.
        value: like key.
        lengths: int64 [rows] on the CPU, how many first keys each row has, 0 to tokens; what lies behind them is not read.
            None means all.
        mask: [rows or 1, 1, n or 1, tokens] in query's dtype, added to the scores. -inf hides a key, and so does the dtype's
            lowest number where the query sees another key. What is hidden must be finite.
        out: [rows, n, heads, d] to write into; shares no memory with the inputs.

    Returns:
        [rows, n, heads, d] in query's dtype. Zeros for a query that sees no key; the average of all values with the lowest
        number for one that sees no other.

    Raises:
        ValueError: a shape, stride, overlap, device or length is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: the tensors are on a CUDA device.
    """
    return call_into(torch_ops.attention, query, key, value, lengths, mask, out=out)


@fake("attention")
def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    rows, heads, n, d = query.shape
    return query.new_empty((rows, n, heads, d))


fake_out("attention", _attention_fake)
