"""What one run asks of a device: launches, kernels, waits of the host, and the time by kind of work.

On a GPU all of it is read from one torch.profiler trace. On a CPU there is nothing to launch: torch operations are counted
instead, and their own times stand for the kernels'.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runtime.counting import DispatchCounter

__all__ = ["BUCKETS", "Asked", "bucket", "observe", "read_trace"]

BUCKETS = ("products", "attention", "norms and elementwise", "copies", "idle")
MARK = "flashu_ext.bench.observed"

# In this order: fused attention kernels also carry names of product libraries. `flash` alone would match our namespace.
_KINDS = (
    ("attention", re.compile(r"flash_(fwd|fprop|attn)|fmha|sdpa|attention|softmax", re.IGNORECASE)),
    (
        "products",
        re.compile(
            r"gemm|gemv|cutlass|cublas|nvjet|xmma|matmul|splitk|triton_(tem|mm)|decode_neurons|few_rows|sum_blocks|gathered_ffn|conv"
            r"|^aten::(mm|bmm|addmm|linear)$",
            re.IGNORECASE,
        ),
    ),
    (
        "copies",
        re.compile(r"memcpy|memset|copy|cat(array|$)|index|gather|scatter|move_rows|list_runs|fill", re.IGNORECASE),
    ),
)
_LAUNCH = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")
_WAIT = {
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
}


@dataclass(frozen=True)
class Asked:
    """What a run asked for, in all.

    Attributes:
        launches: calls that start a kernel or a whole graph. kernels: kernels that ran, those inside graphs too.
        syncs: calls in which the host waits for the device. All three are None on a CPU.
        operations: torch operators that launch something (`runtime.counting`); None on a GPU.
        milliseconds: time by kind of work, BUCKETS; 'idle' is the rest of the run's span. Kernels are sorted by their names.
    """

    launches: int | None
    kernels: int | None
    syncs: int | None
    operations: int | None
    milliseconds: dict[str, float]


def bucket(name: str) -> str:
    """The kind of work of a kernel or of a torch operation, by its name."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "norms and elementwise")


def read_trace(trace: dict[str, Any]) -> Asked:
    """Read a Chrome trace of torch.profiler that holds one range named MARK; times in it are microseconds.

    Raises:
        ValueError: there is no such range.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event["name"] == MARK and event.get("cat") == "user_annotation"]
    if len(marks) != 1:
        raise ValueError(f"trace: expected one range {MARK!r}, got {len(marks)}")
    begin, end = marks[0]["ts"], marks[0]["ts"] + marks[0]["dur"]
    calls = [
        event["name"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and begin <= event["ts"] <= end
    ]
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in work]
    milliseconds = dict.fromkeys(BUCKETS, 0.0)
    for event in work:
        kind = "copies" if event["cat"] != "kernel" else bucket(event["name"])
        milliseconds[kind] += event["dur"] / 1e3
    span = max([end, *(stop for _, stop in spans)]) - begin
    milliseconds["idle"] = max(0.0, span - covered(spans)) / 1e3
    return Asked(
        launches=sum(name.startswith(_LAUNCH) for name in calls),
        kernels=sum(event["cat"] == "kernel" for event in work),
        syncs=sum(name in _WAIT for name in calls),
        operations=None,
        milliseconds=milliseconds,
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (begin, end) spans: kernels of several streams overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def observe(action: Callable[[], Any], device: torch.device) -> Asked:
    """Run `action` under the profiler and say what it asked for. It should have run before: first calls load kernels."""
    return _observe_gpu(action, device) if device.type == "cuda" else _observe_cpu(action)


def _observe_gpu(action: Callable[[], Any], device: torch.device) -> Asked:
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(MARK):
            action()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text(encoding="utf-8", errors="replace")))


def _observe_cpu(action: Callable[[], Any]) -> Asked:
    from torch.profiler import ProfilerActivity, profile

    with DispatchCounter() as count:
        action()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        action()
        span = (time.perf_counter() - began) * 1e3
    milliseconds = dict.fromkeys(BUCKETS, 0.0)
    for event in profiler.key_averages():
        milliseconds[bucket(event.key)] += event.self_cpu_time_total / 1e3
    milliseconds["idle"] = max(0.0, span - sum(milliseconds.values()))
    return Asked(None, None, None, count.counts.launched, milliseconds)
