"""Everything that needs a GPU, in one command: conformance, tests, sanitizers, and the tables.

    python -m flashu_ext.bench gpu --out DIR

Needs no network. Each part writes what it found to DIR, and a part that fails does not keep the next from running; the exit
code is 1 if any failed. The tables go to DIR/results.json and DIR/results.md, with GPU, driver, torch, commit and command.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import machine
from ..planning.tables import markdown_table
from .counters import FEW_ROWS
from .ffn import SHAPES
from .predict import predicted_times
from .roofline import plot
from .timing import Timing, measure

__all__ = ["Line", "Settings", "markdown", "run"]

ROOT = Path(__file__).resolve().parents[2]
FFN_SHAPES = {name: SHAPES[name] for name in ("1.5b", "7b", "head")}
FFN_ROWS = (1, 4, 16, 64, 256, 730, 1460, 2048, 8192)
# Goals for the whole FFN at 80 % of the neurons on an H200, microseconds.
GOALS = {
    ("1.5b", 1): 18, ("1.5b", 16): 19, ("1.5b", 1460): 140, ("1.5b", 2048): 188, ("1.5b", 8192): 730,
    ("7b", 1): 82, ("7b", 16): 84, ("7b", 1460): 660, ("7b", 2048): 905, ("7b", 8192): 3560,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What is run. device: 'cuda', or 'cpu' to try the command itself at small shapes. parts: names of PARTS."""

    out: Path
    device: str = "cuda"
    parts: tuple[str, ...] = ()
    seconds: float = 0.4
    build: Path | None = None


@dataclass
class Line:
    """One shape of one op: floating-point operations and bytes that it needs at least, and what the variants took."""

    op: str
    shape: str
    flops: float
    bytes: float
    timing: Timing
    ours: str
    baseline: str
    goal_us: float | None = None
    predicted_us: float | None = None  # from counts; docs/predicted.md


@dataclass
class Ceilings:
    """What the device does at best, measured: dense bf16 product (TFLOP/s) and copy (GB/s, read and written)."""

    tflops: float
    gbs: float


@dataclass
class Result:
    machine: dict[str, str]
    command: str
    ceilings: Ceilings
    parts: dict[str, str] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)


def run(settings: Settings) -> Result:
    """Run all parts and write what they found.

    Raises:
        RuntimeError: there is no such device.
    """
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device answers; --device cpu tries the command itself")
    settings.out.mkdir(parents=True, exist_ok=True)
    result = Result(_facts(device), machine.command_line(), _ceilings(device, settings.seconds))
    parts: dict[str, Callable[[Settings, Result], str]] = PARTS
    for name in settings.parts or tuple(parts):
        began = time.perf_counter()
        try:
            text = parts[name](settings, result)
        except Exception as error:  # the next part still runs, and the reason is kept
            text = f"failed: {type(error).__name__}: {error}"
        result.parts[name] = f"{text} ({time.perf_counter() - began:.0f} s)"
        print(f"{name}: {result.parts[name]}", flush=True)
        _write(settings, result)
    if any(line.flops for line in result.lines) and importlib.util.find_spec("matplotlib"):
        plot(asdict(result), settings.out / "roofline.png")
    return result


def _write(settings: Settings, result: Result) -> None:
    (settings.out / "results.json").write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    (settings.out / "results.md").write_text(markdown(result), encoding="utf-8")


def _facts(device: torch.device) -> dict[str, str]:
    facts = machine.facts()
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _ceilings(device: torch.device, seconds: float) -> Ceilings:
    side, bytes_ = (8192, 1 << 30) if device.type == "cuda" else (512, 1 << 24)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(bytes_, dtype=torch.uint8, device=device).random_() for _ in range(2))
    timing = measure({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, seconds)
    microseconds = timing.microseconds
    return Ceilings(2 * side**3 / microseconds["product"] / 1e6, 2 * bytes_ / microseconds["copy"] / 1e3)


# ---- checks


def _command(settings: Settings, name: str, command: list[str], timeout: float, **environment: str) -> str:
    """Run a program, keep what it printed, and raise where it failed."""
    log = settings.out / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, timeout=timeout, env={**os.environ, **environment}
        )
    text = log.read_text(encoding="utf-8", errors="replace")
    last = text.strip().splitlines()[-1:] or [""]
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}, see {log.name}: {last[0]}")
    return last[0]


def _program(settings: Settings, name: str) -> str:
    build = settings.build or ROOT / "build" / sys.implementation.cache_tag
    path = build / "cpp_tests" / name
    if not path.is_file():
        raise RuntimeError(f"{path} is missing; configure with -DFLASHU_TESTS=ON and build")
    return str(path)


def _conformance(settings: Settings, result: Result) -> str:
    """Device and emulator must print the same hashes: what the emulator's tests say then holds for the device."""
    printed = [
        subprocess.run([_program(settings, name)], check=True, capture_output=True, text=True, timeout=300).stdout
        for name in ("flashu_conformance_emulated", "flashu_conformance_gpu")
    ]
    for name, text in zip(("emulated", "gpu"), printed, strict=True):
        (settings.out / f"conformance_{name}.txt").write_text(text, encoding="utf-8")
    pairs = list(zip(*(text.splitlines() for text in printed), strict=True))
    wrong = [b for a, b in pairs if a != b]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(pairs)} lines differ, the first: {wrong[0]}")
    return f"{len(pairs)} hashes agree"


def _tests(settings: Settings, result: Result) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "python_tests")]
    return _command(settings, "pytest", command, 240)


def _cpp_tests(settings: Settings, result: Result) -> str:
    return _command(settings, "cpp_tests", [_program(settings, "flashu_gpu_tests"), "--gtest_brief=1"], 120)


def _boxes(settings: Settings, result: Result) -> str:
    """In a process of its own: where the hardware refuses a box that is larger than its matrix, the context is lost."""
    command = [_program(settings, "flashu_gpu_tests"), "--gtest_brief=1", "--gtest_filter=*ABoxLargerThanItsMatrix"]
    return _command(settings, "boxes", command, 60)


def _pairs(settings: Settings, result: Result) -> str:
    """In a process of its own: blocks of a cluster that wait for each other in vain would hold up all that follows."""
    command = [_program(settings, "flashu_gpu_tests"), "--gtest_brief=1", "--gtest_filter=DeviceClusters*"]
    return _command(settings, "pairs", command, 60)


def _sanitizer(tool: str, tests: str) -> Callable[[Settings, Result], str]:
    def part(settings: Settings, result: Result) -> str:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(program).is_file():
            return "skipped: no compute-sanitizer"
        command = [program, "--tool", tool, "--error-exitcode", "7", _program(settings, "flashu_gpu_tests")]
        return _command(settings, tool, [*command, "--gtest_brief=1", f"--gtest_filter={tests}"], 240)

    return part


# ---- tables


def _ffn_lines(settings: Settings, result: Result) -> str:
    device = torch.device(settings.device)
    shapes = FFN_SHAPES if device.type == "cuda" else {"tiny": (64, 160)}
    for name, (hidden, intermediate) in shapes.items():
        for rows in FFN_ROWS if device.type == "cuda" else (1, 20):
            for line in _ffn_of(name, hidden, intermediate, rows, device, settings.seconds):
                result.lines.append(line)
                print(text_of(line, result.ceilings), flush=True)
    return f"{sum(line.op == 'ffn' for line in result.lines)} shapes"


def _ffn_of(
    name: str, hidden: int, intermediate: int, rows: int, device: torch.device, seconds: float
) -> Iterator[Line]:
    """The whole FFN at 80 % of the neurons: ours by one run, runs of eight, an index; cuBLAS on a copy, on views, dense."""
    kept = intermediate * 4 // 5 // 64 * 64
    generator = torch.Generator(device=device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(torch.bfloat16)

    x = randn(rows, hidden)
    gate, up = (randn(intermediate, hidden, scale=hidden**-0.5) for _ in range(2))
    down = randn(hidden, intermediate, scale=intermediate**-0.5)
    copies = gate[:kept].clone(), up[:kept].clone(), down[:, :kept].clone()
    both = torch.cat(copies[:2])
    # Runs of eight with gaps, and the same neurons in any order.
    starts = torch.randperm(intermediate // 8, generator=generator, device=device)[: kept // 8].sort().values * 8
    runs = [number for start in starts.tolist() for number in (start, 8)]
    index = (starts[:, None] + torch.arange(8, device=device)).flatten()
    index = index[torch.randperm(kept, generator=generator, device=device)].to(torch.int32)

    def torchs(w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)

    def one_silu_mul() -> Tensor:
        return F.linear(silu_mul(F.linear(x, both)), copies[2])

    silu_mul: Callable[[Tensor], Tensor] = torch.compile(_silu_mul) if device.type == "cuda" else _silu_mul
    compiled = torch.compile(torchs) if device.type == "cuda" else torchs
    variants = {
        "one run": lambda: ops.gathered_ffn(x, gate, up, down, runs=[0, kept]),
        "runs of 8": lambda: ops.gathered_ffn(x, gate, up, down, runs=runs),
        "index": lambda: ops.gathered_ffn(x, gate, up, down, index=index),
        "copy + silu_mul": one_silu_mul,
        "views": lambda: torchs(gate[:kept], up[:kept], down[:, :kept]),
        "dense": lambda: torchs(gate, up, down),
        "compiled copy": lambda: compiled(*copies),
    }
    with torch.inference_mode():
        timing = measure(variants, device, seconds)
    flops = 6.0 * rows * hidden * kept
    bytes_ = 2.0 * (3 * hidden * kept + 2 * rows * hidden)
    shape = f"{name} M={rows}"
    goal, predicted = GOALS.get((name, rows)), predicted_times().get(shape)
    yield Line("ffn", shape, flops, bytes_, timing, "one run", "copy + silu_mul", goal, predicted)


def _linear_lines(settings: Settings, result: Result) -> str:
    """Linear layers with bias, of few rows, beside torch's."""
    device = torch.device(settings.device)
    generator = torch.Generator(device=device).manual_seed(0)
    shapes = [(hidden, k) for hidden, intermediate in FFN_SHAPES.values() for k in (hidden, intermediate)]
    before = len(result.lines)
    for (n, k), rows in itertools.product(shapes if device.type == "cuda" else [(64, 160)], FEW_ROWS):
        x, weight, bias = (
            (torch.randn(*sizes, generator=generator, device=device) * scale).to(torch.bfloat16)
            for sizes, scale in (((rows, k), 1.0), ((n, k), k**-0.5), ((n,), 1.0))
        )
        variants: dict[str, Callable[[], Tensor]] = {
            "ours": functools.partial(ops.linear, x, weight, bias),
            "torch": functools.partial(F.linear, x, weight, bias),
        }
        with torch.inference_mode():
            timing = measure(variants, device, settings.seconds)
        bytes_, shape = 2.0 * (n * k + rows * (n + k) + n), f"{n} x {k} M={rows}"
        line = Line("linear", shape, 0.0, bytes_, timing, "ours", "torch", None, predicted_times().get(shape))
        result.lines.append(line)
        print(text_of(line, result.ceilings), flush=True)
    return f"{len(result.lines) - before} shapes"


def _silu_mul(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def _row_lines(settings: Settings, result: Result) -> str:
    """Norms, routing and step ops against torch eager and torch.compile of the reference."""
    from ..ops import reference

    device = torch.device(settings.device)
    tokens = 1460 if device.type == "cuda" else 12
    before = len(result.lines)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    x, y, weight = randn(2, tokens // 2, 2048), randn(2, tokens // 2, 2048), randn(2048)
    shift, scale = randn(2, 2048), randn(2, 2048)
    heads = randn(2, tokens // 2, 12, 128), randn(2, tokens // 2, 2, 128), randn(2, tokens // 2, 2, 128)
    tables = randn(1, tokens // 2, 128), randn(1, tokens // 2, 128)
    caches = (randn(2, 2, tokens, 128).transpose(1, 2), randn(2, 2, tokens, 128).transpose(1, 2))
    scores, values = torch.rand(1, 2048, device=device), randn(1, 4, 2048, 128)
    index = torch.arange(0, 2048, 2, device=device)
    rows = randn(2048, 1536)
    latents, velocity = torch.randn(1, 16, 54, 54, device=device), randn(2, 729, 64)
    s, dt, step = (
        torch.ones(50, device=device),
        torch.ones(50, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    state = randn(3, tokens, 2048)
    moved = 2.0 * x.numel()
    calls: dict[str, tuple[tuple[Any, ...], float]] = {
        "rms_norm": ((x, weight, 1e-6), 2 * moved),
        "add_rms_norm_": ((x.clone(), y.clone(), weight, 1e-6), 4 * moved),
        "rms_norm modulated": ((x, weight, 1e-6, shift, scale), 2 * moved),
        "gate_add_": ((x.clone(), y, scale), 3 * moved),
        "rotary_cache_": ((*heads, *tables, *caches), 2.0 * 2 * sum(t.numel() for t in heads)),
        "cosine_importance": ((x, y, "mean"), 2 * moved),
        "value_norms": ((values,), 2.0 * values.numel()),
        "select_topk": ((scores, 1024), 4.0 * scores.numel() + 8 * 1024),
        "gather_rows": ((rows, index), 2 * 2.0 * index.numel() * 1536),
        "scatter_rows_": ((rows.clone(), index, rows[: index.numel()].clone()), 2 * 2.0 * index.numel() * 1536),
        "guided_euler_step_": ((latents, velocity, s, dt, step), 2 * 4.0 * latents.numel() + 2.0 * velocity.numel()),
        "feature_delta": ((x, y), 2 * moved),
        "taylor_predict": ((state, 2.0, 3), 2.0 * (state.numel() + state[0].numel())),
    }
    for name, (arguments, bytes_) in calls.items():
        op = name.split()[0]
        ours, theirs = getattr(ops, op), getattr(reference, op)
        compiled = torch.compile(theirs) if device.type == "cuda" else theirs

        def call(function: Callable[..., Any], arguments: tuple[Any, ...] = arguments) -> Callable[[], Any]:
            return lambda: function(*arguments)

        with torch.inference_mode():
            variants = {"ours": call(ours), "torch": call(theirs), "compiled": call(compiled)}
            timing = measure(variants, device, settings.seconds)
        line = Line(name, "x".join(str(n) for n in arguments[0].shape), 0.0, bytes_, timing, "ours", "torch")
        result.lines.append(line)
        print(text_of(line, result.ceilings), flush=True)
    return f"{len(result.lines) - before} ops"


# ---- for people


def text_of(line: Line, ceilings: Ceilings) -> str:
    """`op shape: us | TFLOP/s | % of peak | GB/s | % of bandwidth | x baseline`, and the other variants' times."""
    microseconds = line.timing.microseconds
    if line.ours not in microseconds:
        return f"{line.op} {line.shape}: {line.timing.failures.get(line.ours, 'not measured')}"
    us = microseconds[line.ours]
    parts = [f"{us:.1f} us"]
    if line.flops:
        rate = line.flops / us / 1e6
        parts.append(f"{rate:.0f} TFLOP/s ({100 * rate / ceilings.tflops:.0f} %)")
    bandwidth = line.bytes / us / 1e3
    parts.append(f"{bandwidth:.0f} GB/s ({100 * bandwidth / ceilings.gbs:.0f} %)")
    if line.baseline in microseconds:
        parts.append(f"{microseconds[line.baseline] / us:.2f}x {line.baseline}")
    if line.goal_us:
        parts.append(f"goal {line.goal_us:g} us {'met' if us <= line.goal_us else 'missed'}")
    others = ", ".join(f"{name} {value:.1f}" for name, value in microseconds.items() if name != line.ours)
    return f"{line.op} {line.shape}: " + " | ".join(parts) + f" | {others}"


def floor_us(line: Line, ceilings: Ceilings) -> float:
    """The least time that the operations and the bytes allow on this device."""
    return max(line.flops / ceilings.tflops / 1e6, line.bytes / ceilings.gbs / 1e3)


def markdown(result: Result) -> str:
    """The result as a page: facts, parts, and a table for each kind of op."""
    about = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    page = [
        f"`{result.command}`  ",
        f"{about}  ",
        f"measured ceilings: {result.ceilings.tflops:.0f} TFLOP/s bf16, {result.ceilings.gbs:.0f} GB/s copy",
        "",
        *(f"- {name}: {text}" for name, text in result.parts.items()),
    ]
    own = {"ffn": "Gathered FFN", "linear": "Linear layers of few rows"}
    rest = "Norms, routing, step"
    for title in (*own.values(), rest):
        lines = [line for line in result.lines if own.get(line.op, rest) == title]
        if not lines:
            continue
        names = list(dict.fromkeys(name for line in lines for name in line.timing.microseconds))
        page += ["", f"### {title} (us, graph replay, cold L2)", ""]
        page.append("| op | shape | floor | " + " | ".join(names) + " | x baseline |")
        page.append("|---|---|---" + "|---" * (len(names) + 1) + "|")
        ratios = []
        for line in lines:
            us = line.timing.microseconds
            cells = [f"{us[name]:.1f}" if name in us else "-" for name in names]
            ratio = us[line.baseline] / us[line.ours] if line.ours in us and line.baseline in us else math.nan
            ratios += [] if math.isnan(ratio) else [ratio]
            row = [line.op, line.shape, f"{floor_us(line, result.ceilings):.1f}", *cells, f"{ratio:.2f}"]
            page.append("| " + " | ".join(row) + " |")
        if ratios:
            mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
            page.append(f"\nGeometric mean of {lines[0].baseline} / {lines[0].ours}: {mean:.2f}")
    page += predictions(result.lines)
    return "\n".join(page) + "\n"


def predictions(lines: list[Line]) -> list[str]:
    """A table of what was predicted beside what was measured, the last one of the page."""
    both = [
        (line.shape, line.predicted_us, line.timing.microseconds[line.ours])
        for line in lines
        if line.predicted_us and line.ours in line.timing.microseconds
    ]
    if not both:
        return []
    rows = [(shape, f"{predicted:.1f}", f"{us:.1f}", f"{us / predicted:.2f}") for shape, predicted, us in both]
    error = statistics.fmean(abs(predicted / us - 1) for _, predicted, us in both)
    return [
        "",
        "### Predicted beside measured (us, by one run; predicted for an H100)",
        "",
        markdown_table([("shape", "predicted", "measured", "measured / predicted"), *rows]),
        "",
        f"Mean error of the prediction: {100 * error:.0f} %",
    ]


PARTS: dict[str, Callable[[Settings, Result], str]] = {
    "boxes": _boxes,
    "pairs": _pairs,
    "conformance": _conformance,
    "cpp tests": _cpp_tests,
    "ffn": _ffn_lines,
    "linear": _linear_lines,
    "rows": _row_lines,
    "tests": _tests,
    "memcheck": _sanitizer("memcheck", "*"),
    # racecheck reports false positives where cp.async.bulk is used: the Hopper products are left out.
    "racecheck": _sanitizer(
        "racecheck", "DeviceNorm*:DeviceStep*:DeviceRouting*:DeviceMoves*:*Ampere*:*Decoding*:*FewRows*"
    ),
}
