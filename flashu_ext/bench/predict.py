"""Times of kernels predicted from their counts, held against figures that others published. No GPU is needed.

`python -m flashu_ext.bench predict` prints predicted beside published for the ladder of bf16 products of fast.cu (its kernels
stay outside the repository; their counts are in docs/ladder.json), and predictions for the gathered FFN.
`--ladder FOLDER` makes docs/ladder.json anew from counts of those kernels, `--write` docs/predicted.md.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from ..planning.safe_files import write_text
from ..planning.tables import markdown_table, text_table
from .counters import (
    FEW_ROWS,
    MULTIPROCESSORS,
    ROOT,
    SECTOR,
    SELECTIONS,
    Case,
    Counted,
    Launch,
    count,
    ffn_cases,
    ideal_of,
    linear_cases,
)

__all__ = [
    "H100",
    "LADDER",
    "Device",
    "Prediction",
    "Rung",
    "extrapolated",
    "further",
    "ladder",
    "main",
    "occupancy",
    "predict",
]

LADDER = ROOT / "docs" / "ladder.json"
PAGE = ROOT / "docs" / "predicted.md"
TIMES = ROOT / "docs" / "predicted.json"
PAGE_ROWS = {"1.5b": (1, 16, 64, 256, 730, 1460, 2048, 8192), "7b": (1, 16, 64, 256, 730, 1460)}


@dataclass(frozen=True)
class Device:
    """Published rates, a clock, and four figures of how kernels wait. Nothing was measured by us.

    Attributes:
        clock: GHz. Under a load of products the power limit lowers it; how far is not published for each kernel.
        multiplications: of 16-bit tensor cores, per cycle and multiprocessor (989 TFLOP/s at 1.83 GHz on 132 of them).
        synchronous: the part of that which mma.sync reaches.
        l2: bytes per cycle, of all multiprocessors together (8,986 GB/s at 1,755 MHz); l2_port: of one of them.
        memory: GB/s (3,350 by the data sheet, of which copies get about nine tenths).
        latency, drain: cycles from a box that is asked for to its data, without the time that L2 gives it; cycles of a
            stage's products beyond their own, where none stays under way. From fast.cu's profile of its kernel 3 alone: 1,415
            cycles of loading and 703 of products a stage.
        store: cycles a 32-byte sector that threads store, assumed (the same profile has 4,572 for 4,096 in two blocks).
        arrival: cycles a thread that arrives at an mbarrier. FITTED to kernels 5 and 6 of the ladder; the only one.
    """

    multiprocessors: int = MULTIPROCESSORS
    clock: float = 1.755
    multiplications: int = 2048
    synchronous: float = 0.62
    l2: float = 5120.0
    l2_port: float = 64.0
    memory: float = 3000.0
    shared: float = 128.0
    schedulers: int = 4
    special: float = 0.5  # instructions of a warp, per cycle: 16 lanes
    registers: int = 65536
    shared_bytes: int = 228 * 1024
    threads: int = 2048
    latency: float = 570.0
    drain: float = 191.0
    store: float = 1.0
    arrival: float = 0.35


H100 = Device()


@dataclass(frozen=True)
class Prediction:
    """A launch's time and what it is made of, in cycles of the busiest multiprocessor.

    Attributes:
        parts: what runs beside each other; the longest of them is what counts. exposed: what runs alone.
    """

    us: float
    bound: str
    parts: dict[str, float]
    exposed: float


def occupancy(launch: Launch, registers: int, device: Device = H100) -> int:
    """Blocks that fit on a multiprocessor at once."""
    threads = int(launch.raw["threads"])
    by_registers = device.registers // (-(-registers // 8) * 8 * threads)
    by_shared = device.shared_bytes // max(int(launch.raw["shared_bytes"]), 1)
    return max(1, min(by_registers, by_shared, device.threads // threads, 32))


def predict(launch: Launch, registers: int = 128, device: Device = H100, issued: float | None = None) -> Prediction:
    """The time of one launch on an idle device; what a launch itself costs is not in it.

    Args:
        registers: of a thread, by ptxas. issued: instructions that ptxas makes of those in the counts, as a factor.
    """
    raw, shared = launch.raw, launch.raw["shared"]
    rounds = -(-launch.grid // device.multiprocessors)
    resident = min(occupancy(launch, registers, device), rounds)
    stages = raw["stages"]
    share = rounds * (raw["stages_of_busiest_block"] / stages if stages else 1 / launch.grid)
    products = {int(columns): times for columns, times in raw["wgmma"].items()}
    groups = max(1, sum(1 for waits in raw["waits"]["wgmma"] if waits))
    roles = len(launch.by_role())

    # A product of 64 x N x 16 takes N / 2 cycles, or as long as its operands need from shared memory.
    operands = sum(times * (16 + n / 4) for n, times in products.items())
    wgmma = sum(times * max(64 * 16 * n / device.multiplications, 16 + n / 4) for n, times in products.items())
    mma = 16 * 8 * raw["mma_depth"] / (device.multiplications * device.synchronous)
    waiting = raw["wgmma_drains"] / groups * device.drain + raw["arrivals"] * device.arrival
    l2 = SECTOR * launch.sectors("loads", "copies", "box_loads")
    boxes = raw["global"]["box_loads"]["bytes"] + raw["global"]["box_stores"]["bytes"] + raw["multicast_bytes"]
    parts = {
        "tensor cores": share * (wgmma + mma + (waiting if products else 0)),
        "L2": max(l2 / device.l2, share * l2 / device.l2_port),
        "memory": SECTOR * launch.distinct() / device.memory * device.clock,
        "shared memory": share * (launch.wavefronts() + boxes / device.shared + operands),
        "instructions": share * launch.instructions() * (issued or 1.0) / device.schedulers,
        "special functions": share * launch.instructions("special") / device.special,
    }
    steps = share * raw["wgmma_groups"] / groups
    if products and roles == groups:  # no warps that only fetch: a stage's parts follow each other
        stage = device.latency + (parts["L2"] + share * wgmma) / steps + device.drain
        parts["latency"] = steps * stage / resident
    exposed = rounds / resident * device.latency
    if products:
        # What a tile's end keeps the tensor cores waiting for.
        stored = launch.sectors("stores") * device.store
        laid_out = shared["stores"]["wavefronts"] + shared["stmatrix"]["wavefronts"]
        fetched = launch.sectors("loads") / 4
        silu = launch.instructions("special") / device.special
        exposed += share * (stored + laid_out + fetched + silu) / resident
    bound = max(parts, key=lambda name: parts[name])
    return Prediction((parts[bound] + exposed) / device.clock / 1e3, bound, parts, exposed)


# ---- the ladder


@dataclass(frozen=True)
class Rung:
    """A published kernel: TFLOP/s that its author measured, registers that ptxas gives it, and its counts."""

    name: str
    published: float
    registers: int
    launch: Launch
    size: int
    issued: float = 1.0

    def prediction(self, device: Device = H100) -> Prediction:
        return predict(self.launch, self.registers, device, self.issued)

    def predicted(self, device: Device = H100) -> float:
        """TFLOP/s."""
        return float(2e-6 * self.size**3 / self.prediction(device).us)


# M = N = K = 4096, bf16, normally distributed values, H100 SXM: "Outperforming cuBLAS on H100: a Worklog" (Pranjal
# Shankhdhar, 29 November 2024, cudaforfun.substack.com). Kernel 12 came later, without a figure of its author: 771 is from
# "Inside NVIDIA GPUs: Anatomy of high performance matmul kernels" (Aleksa Gordić, 29 September 2025, aleksagordic.com).
# Registers: ptxas 13.0.88.
SIZE = 4096
PUBLISHED = {
    1: ("warp tiles, no tensor cores", 32.0, 161),
    2: ("wgmma and TMA, 64 x 64", 317.0, 61),
    3: ("128 x 128", 423.0, 197),
    4: ("a warpgroup that fetches", 498.0, 189),
    5: ("128 x 256, two that multiply", 631.0, 168),
    6: ("persistent", 660.0, 168),
    7: ("mbarriers in PTX", 704.0, 168),
    8: ("clusters, multicast", 734.0, 168),
    9: ("order of stores", 747.0, 168),
    10: ("stores by TMA", 758.0, 168),
    11: ("Hilbert order", 764.0, 168),
    12: ("stmatrix", 771.0, 168),
}


# Kernel 11 at other sizes, from the file that describes the kernels in the repository's history (November 2024). Nothing of
# the model was chosen with them.
FURTHER = {6144: 794.5, 8192: 808.0}

# In PTX kernel 1 converts both factors for each of its multiply-adds; ptxas keeps 16 x 184 + 86 instructions for 2,048 of
# them (read from SASS), of 3.38 each in PTX. No other kernel is bound by instructions.
ISSUED = {1: (16 * 184 + 86) / 2048 / 3.38}


def extrapolated(near: Any, far: Any, at_near: int, at_far: int, at: int) -> Any:
    """Counts at a depth from those at two smaller ones: each is linear in it.

    Raises:
        ValueError: a count is not what a line gives (not whole), or the launches differ.
    """
    if isinstance(near, dict):
        return {key: extrapolated(near[key], far[key], at_near, at_far, at) for key in near}
    if isinstance(near, list):
        return [extrapolated(a, b, at_near, at_far, at) for a, b in zip(near, far, strict=True)]
    if isinstance(near, str):
        if near != far:
            raise ValueError(f"expected the same launches, got {near} and {far}")
        return near
    value, rest = divmod((far - near) * (at - at_near), at_far - at_near)
    if rest:
        raise ValueError(f"expected counts that are linear in the depth, got {near} and {far}")
    return near + value


def _scaled(raw: dict[str, Any], blocks: int) -> dict[str, Any]:
    """The counts of a larger grid of equal blocks."""
    same = {"kernel", "cluster", "threads", "shared_bytes", "stages_of_busiest_block"}

    def times(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: times(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [times(entry) for entry in value]
        return value * blocks

    x, y, z = raw["grid"]
    scaled = {key: value if key in same else times(value) for key, value in raw.items()}
    return scaled | {"grid": [x * blocks, y, z]}


def read_counts(folder: Path) -> dict[str, Any]:
    """docs/ladder.json from files kN_DEPTH.jsonl (FLASHU_PTX_COUNTERS) of kernel N at two depths and 4096 x 4096, and
    k11atSIZE_DEPTH.jsonl at larger ones.

    Kernel 1 is counted at 512 x 512 and scaled to the larger grid: its blocks are all alike.
    """
    sizes = {str(number): SIZE for number in PUBLISHED} | {f"11at{size}": size for size in FURTHER}
    rungs = {}
    for name, size in sizes.items():
        files = sorted(folder.glob(f"k{name}_*.jsonl"), key=lambda path: int(path.stem.split("_")[1]))[:2]
        if len(files) != 2:
            raise ValueError(f"{folder}: expected counts of kernel {name} at two depths")
        depths = [int(path.stem.split("_")[1]) for path in files]
        near, far = (json.loads(path.read_text(encoding="utf-8").splitlines()[-1]) for path in files)
        raw = extrapolated(near, far, depths[0], depths[1], size)
        rungs[name] = _scaled(raw, 64) if name == "1" else raw
    return rungs


def ladder(path: Path = LADDER) -> list[Rung]:
    """The published kernels with their counts."""
    rungs = json.loads(path.read_text(encoding="utf-8"))
    return [
        Rung(f"{number}: {name}", published, registers, Launch(rungs[str(number)]), SIZE, ISSUED.get(number, 1.0))
        for number, (name, published, registers) in PUBLISHED.items()
    ]


def further(path: Path = LADDER) -> list[Rung]:
    """Published kernels of other sizes, which had no part in the model."""
    rungs = json.loads(path.read_text(encoding="utf-8"))
    return [
        Rung(f"11 at {size}", published, PUBLISHED[11][2], Launch(rungs[f"11at{size}"]), size)
        for size, published in FURTHER.items()
    ]


# ---- reports


def errors(rungs: list[Rung], device: Device = H100) -> list[float]:
    """Predicted over published, less one."""
    return [rung.predicted(device) / rung.published - 1 for rung in rungs]


def inversions(rungs: list[Rung], device: Device = H100) -> int:
    """Pairs of kernels that the prediction puts in another order."""
    values = [rung.predicted(device) for rung in rungs]
    return sum(values[i] > values[j] for j in range(len(values)) for i in range(j))


def ladder_rows(rungs: list[Rung]) -> list[tuple[str, ...]]:
    """Published beside predicted, what bounds each kernel, and the error."""
    rows: list[tuple[str, ...]] = [("kernel", "published TFLOP/s", "predicted", "error", "bound by", "exposed")]
    for rung, error in zip(rungs, errors(rungs), strict=True):
        p = rung.prediction()
        rows.append(
            (
                rung.name,
                f"{rung.published:.0f}",
                f"{rung.predicted():.0f}",
                f"{error:+.1%}",
                p.bound,
                f"{p.exposed / H100.clock / 1e3 / p.us:.0%}",
            )
        )
    return rows


def summary(rungs: list[Rung]) -> str:
    found = errors(rungs)
    pairs = len(rungs) * (len(rungs) - 1) // 2
    clocks = ", ".join(
        f"{statistics.fmean(map(abs, errors(rungs, replace(H100, clock=clock)))):.1%} at {clock:.2f} GHz"
        for clock in (1.5, 1.6, 1.83)
    )
    return (
        f"mean error {statistics.fmean(map(abs, found)):.1%}, largest {max(map(abs, found)):.1%}; "
        f"{inversions(rungs)} of {pairs} pairs in the wrong order. "
        f"The clock is a choice: mean error {clocks}"
    )


def _predicted(launch: Launch) -> Prediction:
    return predict(launch, 168 if "sm90" in launch.kernel else 128)


def _what(case: Case) -> str:
    """What is multiplied, beside the number of rows."""
    return SELECTIONS[case["by"]] if case.op == "ffn" else f"{case['n']} x {case['k']}"


def launch_rows(counted: list[Counted]) -> list[tuple[str, ...]]:
    """Predicted microseconds of the launches of gathered FFNs or linear layers."""
    rows: list[tuple[str, ...]] = [("rows, by", "kernel", "predicted us", "TFLOP/s", "bound by", "exposed")]
    for entry in counted:
        for launch in entry.launches:
            p = _predicted(launch)
            needed = 2e-6 * ideal_of(entry.case, launch, entry.bytes).multiplications / p.us
            rows.append(
                (
                    f"{entry.case['rows']}, {_what(entry.case)}",
                    launch.kernel,
                    f"{p.us:.1f}",
                    f"{needed:.0f}" if needed else "-",
                    p.bound,
                    f"{p.exposed / H100.clock / 1e3 / p.us:.0%}",
                )
            )
    return rows


NOTES = """Predicted from exact counts (docs/counters.md), registers and published rates of an H100: cycles of tensor cores,
L2, memory, shared memory, instructions and special functions beside each other, the longest of which counts; then what
a tile's end and a block's beginning expose. A stage's latency counts where no warp only fetches. One number was fitted
to the ladder: 0.35 cycles for every thread that arrives at an mbarrier. Two are from the author's profile of kernel 3
(1,415 cycles of loading and 703 of products a stage), so that kernel is not an independent one; one is assumed (a cycle
for every sector that threads store). The clock, 1,755 MHz, is a published maximum of the PCIe card (SXM cards go to 1,980
and fall under load); of the clocks tried it fits best, so count it as a second fitted number."""

LIMITS = """What the model does not know: the clock under the power limit (1,755 MHz everywhere), misses of L2 (the order of
tiles, kernel 11), what a launch costs (2 to 3 us), reads that L1 answers, and latencies that few warps do not hide. So
differences of a few per cent between two kernels mean nothing (kernels 8 to 11 are predicted alike, and their order is
chance), and times below about 10 us are lower bounds."""


def predicted_times() -> dict[str, float]:
    """Those of docs/predicted.json; empty where this is no source checkout."""
    return dict(json.loads(TIMES.read_text(encoding="utf-8"))) if TIMES.is_file() else {}


def microseconds(shapes: dict[str, list[Counted]], linear: list[Counted]) -> dict[str, float]:
    """Predicted microseconds of whole FFNs and of linear layers, by shape and rows as flashu_ext/bench/gpu.py names them."""
    entries = [(shape, entry) for shape, counted in shapes.items() for entry in counted]
    entries += [(_what(entry.case), entry) for entry in linear]
    return {
        f"{shape} M={entry.case['rows']}": round(sum(_predicted(launch).us for launch in entry.launches), 1)
        for shape, entry in entries
    }


def page(rungs: list[Rung], shapes: dict[str, list[Counted]], linear: list[Counted]) -> str:
    """docs/predicted.md."""
    tables = "\n\n".join(f"### {shape}\n\n{markdown_table(launch_rows(counted))}" for shape, counted in shapes.items())
    return f"""# Predicted times

Written by `python -m flashu_ext.bench predict --write`. **Nothing here was measured by us.**

{NOTES}

## Published kernels

bf16 products of 4096 x 4096 x 4096 on an H100 SXM. Kernels: pranjalssh/fast.cu at 38eb642 (not in this repository). Published:
"Outperforming cuBLAS on H100: a Worklog" (Pranjal Shankhdhar, 29 November 2024); kernel 12 from "Inside NVIDIA GPUs: Anatomy
of high performance matmul kernels" (Aleksa Gordić, 29 September 2025), which repeats the ladder. Rates: 989 TFLOP/s at
1.83 GHz, L2 8,986 GB/s at 1,755 MHz (PMC10448217, table 3), memory 3,350 GB/s. Counts (docs/ladder.json): at depths 512 and
1,024, continued to 4,096 (each count is linear in the depth, which is checked); kernel 1 at 512 x 512, scaled to the larger grid.

{markdown_table(ladder_rows(rungs))}

{summary(rungs)}.

Kernel 11 at sizes that had no part in the model, by the description of the kernels in the repository's history:

{markdown_table(ladder_rows(further()))}

{LIMITS}

## Gathered FFN, bf16, 80 % of the neurons, H100

{tables}

## Linear layers of few rows, bf16, H100

{markdown_table(launch_rows(linear))}
"""


@click.command(epilog="Example: python -m flashu_ext.bench predict --rows 64 --rows 1460")
@click.option(
    "--shape", default="1.5b", show_default=True, type=click.Choice(("1.5b", "7b", "bench")), help="Of the FFN."
)
@click.option(
    "--rows", multiple=True, type=click.IntRange(1), help="Also the FFN with so many tokens (may be repeated)."
)
@click.option(
    "--ladder",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Make docs/ladder.json from counts of the published kernels in this folder (cpp_tests/ptx/README.md).",
)
@click.option("--write", "writes", is_flag=True, help="Make docs/predicted.md and .json anew (minutes).")
def main(shape: str, rows: tuple[int, ...], folder: Path | None, writes: bool) -> None:
    """Predict times of kernels from their counts, beside published ones."""
    try:
        if folder is not None:
            write_text(LADDER, json.dumps(read_counts(folder), indent=1) + "\n")
        rungs = ladder()
        first, second = (text_table(ladder_rows(each)) for each in (rungs, further()))
        click.echo(f"{first}\n{summary(rungs)}\n\n{second}\n\n{NOTES}\n\n{LIMITS}")
        if rows:
            click.echo(f"\n{text_table(launch_rows(count(ffn_cases(shape, rows, 0.8))))}")
        if writes:
            shapes = {name: count(ffn_cases(name, of_shape, 0.8, ["run"])) for name, of_shape in PAGE_ROWS.items()}
            linear = count(linear_cases("1.5b", FEW_ROWS))
            write_text(PAGE, page(rungs, shapes, linear))
            write_text(TIMES, json.dumps(microseconds(shapes, linear), indent=1) + "\n")
            click.echo(f"wrote {PAGE} and {TIMES}")
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
