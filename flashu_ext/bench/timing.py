"""Timing of variants against each other: interleaved in one process, medians, cold caches.

On a GPU every variant is captured into a CUDA graph, which leaves launch gaps out, and is timed by events; the L2 is
flushed before each replay. On a CPU plain calls are timed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Timing", "flush_bytes", "measure"]

Variant = Callable[[], Any]


@dataclass
class Timing:
    """Medians in microseconds by variant; `eager` with launch gaps, where they were measured. failures: variant -> why."""

    microseconds: dict[str, float] = field(default_factory=dict)
    eager: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def flush_bytes(device: torch.device) -> int:
    """Bytes that are written to push everything else out of the last-level cache."""
    if device.type != "cuda":
        return 64 << 20
    return 4 * torch.cuda.get_device_properties(device).L2_cache_size


def measure(variants: Mapping[str, Variant], device: torch.device, seconds: float = 0.5, rounds: int = 20) -> Timing:
    """Time variants in another order each round, until `rounds` are done or `seconds` are over (at least 5 rounds).

    A variant that fails is left out, with its reason: one baseline that cannot run must not cost the others.
    """
    result = Timing()
    if device.type == "cuda":
        _measure_gpu(variants, device, seconds, rounds, result)
    else:
        _measure_cpu(variants, seconds, rounds, result)
    return result


def _survivors(variants: Mapping[str, Variant], prepare: Callable[[Variant], Any], result: Timing) -> dict[str, Any]:
    ready = {}
    for name, run in variants.items():
        try:
            ready[name] = prepare(run)
        except (RuntimeError, ImportError, NotImplementedError, ValueError) as error:
            result.failures[name] = " ".join(str(error).split())[:200]
    return ready


def _interleave(
    ready: Mapping[str, Any], once: Callable[[Any], float], seconds: float, rounds: int
) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in ready}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    done = 0
    while done < 5 or (done < rounds and time.perf_counter() < end):
        for name, variant in order.sample(list(ready.items()), len(ready)):
            samples[name].append(once(variant))
        done += 1
    return {name: statistics.median(times) for name, times in samples.items()}


def _measure_cpu(variants: Mapping[str, Variant], seconds: float, rounds: int, result: Timing) -> None:
    def once(run: Variant) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6

    def prepare(run: Variant) -> Variant:
        run()
        return run

    result.microseconds = _interleave(_survivors(variants, prepare, result), once, seconds, rounds)


def _measure_gpu(
    variants: Mapping[str, Variant], device: torch.device, seconds: float, rounds: int, result: Timing
) -> None:
    flush = torch.empty(flush_bytes(device), dtype=torch.int8, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def capture(run: Variant) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph

    def timed(work: Callable[[], Any]) -> float:
        flush.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    graphs = _survivors(variants, capture, result)
    result.microseconds = _interleave(graphs, lambda graph: timed(graph.replay), seconds, rounds)
    result.eager = _interleave({name: variants[name] for name in graphs}, timed, seconds / 4, 10)
