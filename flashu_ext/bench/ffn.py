"""The gathered FFN beside what one would write without it: torch dense, torch on a pruned copy, torch
gathering and multiplying. All variants are timed in one process, interleaved, on random-normal data."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import machine, reference

__all__ = ["DTYPES", "SHAPES", "Report", "Row", "Settings", "explain", "run"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"1.5b": (1536, 8960), "7b": (3584, 18944), "bench": (512, 2816), "head": (2048, 8192)}

VARIANTS = ("torch dense", "torch pruned", "torch gather", "one run", "run list", "index list")
INT8 = ("int8 torch", "int8 one run", "int8 index list")
"""With int8 weights and a scale per row: torch as torchao computes it, dense, and this library's kernel."""


@dataclass(frozen=True)
class Settings:
    """What is measured; see `flashu-ext bench ffn --help`.

    Attributes:
        shape: a name of SHAPES, hidden and intermediate size. keep: fraction of the neurons.
        rows: numbers of tokens.
        seconds: time to spend on each number of rows.
        int8: also with int8 weights (`INT8`), beside the others in their dtype.
    """

    shape: str = "1.5b"
    dtype: str = "fp32"
    rows: tuple[int, ...] = (1, 8, 16, 128, 512, 1460)
    keep: float = 0.8
    seconds: float = 4.0
    threads: int | None = None
    seed: int = 0
    int8: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        return (*VARIANTS, *INT8) if self.int8 else VARIANTS


@dataclass
class Row:
    """Medians of one number of tokens, in microseconds by variant, and rounds measured."""

    rows: int
    rounds: int
    microseconds: dict[str, float] = field(default_factory=dict)

    def ratio(self, variant: str, to: str = "torch dense") -> float:
        return self.microseconds[variant] / self.microseconds[to]


@dataclass
class Report:
    settings: Settings
    results: list[Row]
    machine: str
    command: str

    def table(self) -> str:
        hidden, intermediate = SHAPES[self.settings.shape]
        kept = int(intermediate * self.settings.keep)
        lines = [
            f"gathered FFN {self.settings.shape} ({hidden} x {intermediate}, {kept} neurons kept), {self.settings.dtype}: "
            "microseconds (of torch dense)",
            f"{'rows':>6} " + " ".join(f"{name:>17}" for name in self.settings.variants) + f" {'GFLOP/s':>9}",
        ]
        for row in self.results:
            cells = [f"{row.microseconds[name]:>9.0f} ({row.ratio(name):4.2f}x)" for name in self.settings.variants]
            rate = 6 * row.rows * hidden * kept / row.microseconds["one run"] / 1e3
            lines.append(f"{row.rows:>6} " + " ".join(f"{cell:>17}" for cell in cells) + f" {rate:>9.0f}")
        lines += ["", f"command: {self.command}", f"machine: {self.machine}"]
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def run(settings: Settings) -> Report:
    """Measure all variants for every number of rows.

    Raises:
        ValueError: a setting is out of range.
    """
    if not 0 < settings.keep <= 1:
        raise ValueError(f"keep: expected a fraction in (0, 1], got {settings.keep}")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    results = []
    with torch.inference_mode():
        for rows in settings.rows:
            variants = _variants(settings, rows)
            results.append(_measure(rows, variants, settings.seconds))
    return Report(settings, results, machine.describe(), machine.command_line())


def _variants(settings: Settings, rows: int) -> dict[str, Callable[[], Tensor]]:
    hidden, intermediate = SHAPES[settings.shape]
    dtype = DTYPES[settings.dtype]
    generator = torch.Generator().manual_seed(settings.seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    x = randn(rows, hidden)
    gate, up = randn(intermediate, hidden, scale=hidden**-0.5), randn(intermediate, hidden, scale=hidden**-0.5)
    down = randn(hidden, intermediate, scale=intermediate**-0.5)
    kept = int(intermediate * settings.keep)
    index = torch.randperm(intermediate, generator=generator)[:kept].sort().values
    # Runs of eight neurons, as many as make up the fraction: what rounding an arbitrary set to small blocks gives.
    blocks = torch.randperm(intermediate // 8, generator=generator)[: kept // 8].sort().values
    runs = [number for block in blocks.tolist() for number in (8 * block, 8)]
    pruned = gate[:kept].clone(), up[:kept].clone(), down[:, :kept].clone()

    def torch_ffn(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    variants = {
        "torch dense": lambda: torch_ffn(gate, up, down),
        "torch pruned": lambda: torch_ffn(*pruned),
        "torch gather": lambda: torch_ffn(gate[index], up[index], down[:, index]),
        "one run": lambda: ops.gathered_ffn(x, gate, up, down, runs=[0, kept]),
        "run list": lambda: ops.gathered_ffn(x, gate, up, down, runs=runs),
        "index list": lambda: ops.gathered_ffn(x, gate, up, down, index=index),
    }
    if settings.int8:
        quantised = (*_int8(gate), *_int8(up), *_int8(down))
        variants |= {
            "int8 torch": lambda: reference.int8_ffn(x, *quantised),
            "int8 one run": lambda: ops.int8_ffn(x, *quantised, runs=[0, kept]),
            "int8 index list": lambda: ops.int8_ffn(x, *quantised, index=index),
        }
    return variants


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, K] in int8 and its scales fp32 [N], symmetric by rows."""
    scale = weight.float().abs().amax(1) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def _measure(rows: int, variants: dict[str, Callable[[], Tensor]], seconds: float) -> Row:
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for run_once in variants.values():
        run_once()
    end = time.perf_counter() + seconds
    rounds = 0
    order = random.Random(0)
    while rounds < 3 or time.perf_counter() < end:
        # In another order each round: what ran before (a gather leaves the caches full of dirty lines) must not
        # always be charged to the same variant.
        for name, run_once in order.sample(list(variants.items()), len(variants)):
            start = time.perf_counter()
            run_once()
            samples[name].append((time.perf_counter() - start) * 1e6)
        rounds += 1
    return Row(rows, rounds, {name: statistics.median(times) for name, times in samples.items()})


LEGEND = """* is chosen. Tiles: rows x columns of the result (of the up half: neurons). Waves: blocks to each multiprocessor. In
pairs: two blocks fetch the weights for both. Predicted in closed form by the model of docs/predicted.md, which is off by 5 %
on average for published kernels (at most 22 %); its times from exact counts stand there."""


def explain(settings: Settings, device: str = "cpu") -> str:
    """Which kernels would serve each problem: the candidates with their predicted cost, the choice first.

    Args:
        device: "cpu": how the kernels of this machine block it. "cuda": the tiles on an H100 or H200 (sm_90, 132
            multiprocessors) and on an A100 (sm_80, 108), for one range and for an index list; no GPU is needed.
    """
    from ..ops import explain as kernels

    hidden, intermediate = SHAPES[settings.shape]
    kept = int(intermediate * settings.keep)
    texts = []
    for rows in settings.rows:
        if device == "cuda":
            texts += [
                kernels.explain_ffn(rows, hidden, kept, settings.dtype, listed, capability, multiprocessors)
                for capability, multiprocessors in ((90, 132), (80, 108))
                for listed in (False, True)
            ]
            continue
        texts.append(
            f"gate and up, {rows} rows: " + kernels.explain_gemm(rows, 2 * kept, hidden, settings.dtype, False)
        )
        texts.append(f"down, {rows} rows: " + kernels.explain_gemm(rows, hidden, kept, settings.dtype, False))
    if device == "cuda":
        texts.append(LEGEND)
    return "\n".join(texts)
