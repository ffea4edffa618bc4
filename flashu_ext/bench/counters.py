"""What the CUDA kernels execute and move, counted on the machine for PTX (cpp_tests/ptx). No GPU is needed, nothing is timed.

`python -m flashu_ext.bench counters` counts ops at the shapes of Show-o2 beside what must move and be multiplied at least;
`--check` compares small shapes with docs/counters.json, and `--write` makes that file and docs/counters.md anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..planning.safe_files import write_text
from ..planning.tables import markdown_table, text_table
from .ffn import SHAPES

__all__ = [
    "CHECKED",
    "Case",
    "Launch",
    "Ideal",
    "count",
    "differences",
    "ffn_cases",
    "find_program",
    "ideal_of",
    "linear_cases",
    "main",
    "rows_of",
]

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "docs" / "counters.json"
PAGE = ROOT / "docs" / "counters.md"
PROGRAM = "flashu_count_ops"

SECTOR = 32
TOLERANCE = 0.02
MULTIPROCESSORS = 132
# The ways to name neurons, as the program numbers them.
SELECTIONS = ("run", "eights", "index", "runs of 64")
FETCHES = ("threads", "range", "64s", "eights", "rows")
READS = ("vectors", "values", "listed")


@dataclass(frozen=True)
class Case:
    """An op at one shape, for devices of one capability."""

    op: str
    sizes: tuple[tuple[str, int], ...]
    capability: int = 90

    @staticmethod
    def of(op: str, capability: int = 90, **sizes: int) -> Case:
        return Case(op, tuple(sizes.items()), capability)

    @property
    def argument(self) -> str:
        """As the program takes it."""
        return f"{self.op}:" + ",".join(f"{name}={size}" for name, size in self.sizes)

    @property
    def name(self) -> str:
        """The key in the baseline."""
        return f"sm{self.capability} {self.argument}"

    def __getitem__(self, size: str) -> int:
        return dict(self.sizes)[size]


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the program printed it."""

    raw: dict[str, Any]

    @property
    def kernel(self) -> str:
        return short_name(self.raw["kernel"])

    @property
    def grid(self) -> int:
        x, y, z = self.raw["grid"]
        return int(x * y * z)

    def instructions(self, kind: str | None = None) -> int:
        """Of warps; all but moves and parameters, most of which ptxas removes."""
        kinds: dict[str, list[int]] = self.raw["instructions"]
        if kind is not None:
            return sum(kinds.get(kind, ()))
        return sum(sum(by_role) for name, by_role in kinds.items() if name != "free")

    def by_role(self) -> list[int]:
        """Instructions of each warpgroup of a block."""
        roles = [by_role for name, by_role in self.raw["instructions"].items() if name != "free"]
        return [sum(r[i] for r in roles if i < len(r)) for i in range(max(map(len, roles), default=0))]

    def sectors(self, *ways: str) -> int:
        """32-byte sectors that requests to global memory touch; all ways without names."""
        return sum(counts["sectors"] for way, counts in self.raw["global"].items() if not ways or way in ways)

    def requests(self, *ways: str) -> int:
        return sum(counts["requests"] for way, counts in self.raw["global"].items() if not ways or way in ways)

    def distinct(self) -> int:
        """Sectors of the launch, each once: what memory moves if the caches keep everything."""
        return int(self.raw["distinct"]["read"] + self.raw["distinct"]["written"])

    def wavefronts(self) -> int:
        return sum(counts["wavefronts"] for counts in self.raw["shared"].values())

    def least_wavefronts(self) -> int:
        return sum(counts["least"] for counts in self.raw["shared"].values())

    def products(self) -> int:
        """Instructions of wgmma, of a warpgroup each."""
        return sum(self.raw["wgmma"].values())

    def multiplications(self) -> int:
        """Of tensor cores, with those of padding."""
        wgmma = sum(64 * 16 * int(columns) * times for columns, times in self.raw["wgmma"].items())
        return int(wgmma + 16 * 8 * self.raw["mma_depth"])

    def boxes(self) -> int:
        return self.requests("box_loads")

    def waits(self) -> int:
        """Of warps: for mbarriers, products, copies and barriers."""
        return sum(sum(by_role) for by_role in self.raw["waits"].values())

    def costs(self) -> dict[str, int]:
        """What is compared with the baseline; more of any is worse."""
        return {
            "instructions": self.instructions(),
            "busiest warpgroup": max(self.by_role(), default=0),
            "special functions": self.instructions("special"),
            "requests": self.requests(),
            "sectors": self.sectors(),
            "distinct sectors": self.distinct(),
            "wavefronts": self.wavefronts(),
            "bank conflicts": self.wavefronts() - self.least_wavefronts(),
            "multiplications": self.multiplications(),
            "boxes": self.boxes(),
            "stages": int(self.raw["stages"]),
            "waits": self.waits(),
        }


@dataclass(frozen=True)
class Ideal:
    """The least that a launch has to do: bytes of memory, and multiplications of tensor cores."""

    bytes: int
    multiplications: int


def short_name(kernel: str) -> str:
    """gemm_sm90 up 112 range, gemm_sm90 up 112 range pairs (in clusters of two), decode_neurons<bfloat16, 1>, ..."""
    name = re.sub(r"flashu::|cuda::|core::|\(anonymous namespace\)::", "", kernel)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:at]
            break
    found = re.fullmatch(r"(gemm_sm\d\d)<Config<(\w+), (true|false), (\d+)((?:, \(\w+\)\d)+)(?:, ([12]))?> ?>", name)
    if found is None:
        return name
    half = "up" if found[3] == "true" else "down"
    storage = "" if found[2] == "bfloat16" else f" {found[2]}"
    ways = {"FfnFetch": FETCHES, "Reads": READS}
    fetched = "/".join(ways[kind][int(number)] for kind, number in re.findall(r"\((\w+)\)(\d)", found[5]))
    together = " pairs" if found[6] == "2" else ""
    return f"{found[1]} {half} {found[4]} {fetched}{together}{storage}"


def ideal_of(case: Case, launch: Launch, total_bytes: int, first: bool = True) -> Ideal:
    """The ideal of one launch; of other ops than the FFN the first launch moves all tensors, and others need not be."""
    if case.op == "linear":
        return Ideal(total_bytes, case["rows"] * case["n"] * case["k"]) if first else Ideal(0, 0)
    if case.op != "ffn":
        return Ideal(total_bytes if first else 0, 0)
    rows, hidden, neurons = case["rows"], case["hidden"], case["neurons"]
    kernel = launch.kernel
    if kernel.startswith("decode"):
        return Ideal(2 * (3 * neurons * hidden + rows * hidden), 3 * rows * neurons * hidden)
    if kernel.startswith("gemm") and (" up" in kernel or "true" in kernel):
        return Ideal(2 * (2 * neurons * hidden + rows * (hidden + neurons)), 2 * rows * neurons * hidden)
    if kernel.startswith("gemm"):
        return Ideal(2 * (neurons * hidden + rows * (neurons + 2 * hidden)), rows * neurons * hidden)
    return Ideal(4 * rows * hidden, 0)  # residual in, result out; the sums in between need not be


# ---- cases


def ffn_cases(shape: str, rows: Sequence[int], keep: float, selections: Sequence[str] = SELECTIONS) -> list[Case]:
    """The gathered FFN of a model's shape."""
    hidden, intermediate = SHAPES[shape]
    neurons = int(intermediate * keep) // 64 * 64  # as plans have them
    return [
        Case.of("ffn", rows=r, hidden=hidden, intermediate=intermediate, neurons=neurons, by=SELECTIONS.index(name))
        for r in rows
        for name in selections
    ]


def op_cases(rows: int, width: int) -> list[Case]:
    """Every other op, at a number of tokens and a model's width."""
    keep = rows * 7 // 10
    return [
        Case.of("rms_norm", rows=rows, width=width, modulated=0),
        Case.of("rms_norm", rows=rows, width=width, modulated=1),
        Case.of("add_rms_norm", rows=rows, width=width),
        Case.of("gate_add", rows=rows, width=width),
        Case.of("rotary_cache", rows=rows, heads=12, kv_heads=2, head_dim=128),
        Case.of("cosine_importance", rows=rows, width=width),
        Case.of("value_norms", rows=rows, kv_heads=2, head_dim=128),
        Case.of("select_topk", rows=rows, keep=keep),
        Case.of("gather_rows", rows=rows, keep=keep, width=width),
        Case.of("scatter_rows", rows=rows, keep=keep, width=width),
        Case.of("neuron_norms", rows=rows, width=7168),
        Case.of("guided_euler_step", channels=16, height=54),
        Case.of("feature_delta", rows=rows, width=width),
        Case.of("taylor_update", rows=rows, width=width),
        Case.of("taylor_predict", rows=rows, width=width),
    ]


def linear_cases(shape: str, rows: Sequence[int]) -> list[Case]:
    """Linear layers of a model's width and of its FFN's down half, of few rows."""
    hidden, intermediate = SHAPES[shape]
    return [Case.of("linear", rows=r, n=hidden, k=k) for r in rows for k in (hidden, intermediate)]


def _ffn(rows: int, hidden: int, intermediate: int, neurons: int, by: int, capability: int = 90) -> Case:
    return Case.of("ffn", capability, rows=rows, hidden=hidden, intermediate=intermediate, neurons=neurons, by=by)


# Small shapes at which every kernel and every tile of the FFN is launched; CI counts them.
CHECKED = [
    *(_ffn(1, 512, 2816, 2240, by) for by in range(4)),
    _ffn(16, 512, 2816, 2240, 0),
    _ffn(64, 512, 2816, 2240, 0),
    _ffn(64, 512, 2816, 2240, 0, 80),
    *(_ffn(256, 256, 8960, 7168, by) for by in range(4)),  # up 112 in pairs, and the ways of lists
    *(_ffn(300, 256, 8960, 7168, by) for by in (1, 3)),  # lists in pairs, one block without rows
    _ffn(128, 256, 17920, 14336, 0),  # up 112
    _ffn(128, 256, 17920, 16896, 0),  # up 128
    _ffn(1024, 256, 5120, 4096, 0),  # up 128 in pairs
    _ffn(1460, 1536, 640, 512, 0),  # up 64, down 192
    _ffn(1408, 3072, 80, 64, 0),  # down 192 in pairs, one part
    *(Case.of("linear", rows=rows, n=264, k=k) for rows in (1, 16) for k in (512, 510)),
    *op_cases(200, 1536),
]

PAGE_ROWS = (1, 16, 64, 256, 730, 1460, 2048, 8192)
FEW_ROWS = (1, 16)


def page_cases() -> list[Case]:
    """What docs/counters.md shows: the shapes of the issue tables."""
    return [
        *ffn_cases("1.5b", PAGE_ROWS, 0.8, ["run"]),
        *ffn_cases("1.5b", (1, 64, 1460), 0.8, ["eights", "index", "runs of 64"]),
        *ffn_cases("7b", (1, 64, 730), 0.8, ["run"]),
        *linear_cases("1.5b", FEW_ROWS),
        *op_cases(1460, 1536),
    ]


# ---- counting


def find_program() -> Path:
    """The newest build of the program that counts.

    Raises:
        FileNotFoundError: this is no source checkout with it.
    """
    found = sorted(ROOT.glob(f"build/*/cpp_tests/ptx/{PROGRAM}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"counters: expected {PROGRAM} in a build folder of a source checkout ({ROOT / 'build'}); make it with "
            f"`cmake -G Ninja -S . -B build/cpython-311 -DFLASHU_TESTS=ON` and "
            f"`cmake --build build/cpython-311 --target {PROGRAM}` (needs nvcc, no GPU)"
        )
    return found[-1]


@dataclass(frozen=True)
class Counted:
    """A case with its launches and the bytes of its tensors."""

    case: Case
    bytes: int
    launches: list[Launch]


def count(cases: Sequence[Case], program: Path | None = None, jobs: int = 2) -> list[Counted]:
    """Counts every case, a few at a time.

    Raises:
        RuntimeError: the program failed; its own words.
    """
    chosen = program or find_program()

    def one(case: Case) -> Counted:
        environment = {
            **os.environ,
            "FLASHU_PTX_WHEN": "eager",
            "FLASHU_PTX_VALUES": "0",
            "FLASHU_PTX_SEED": "0",
            "FLASHU_PTX_SMS": str(MULTIPROCESSORS),
            "FLASHU_PTX_CAPABILITY": str(case.capability),
            "OMP_NUM_THREADS": "1",
        }
        ran = subprocess.run([str(chosen), case.argument], env=environment, capture_output=True, text=True)
        if ran.returncode != 0:
            raise RuntimeError(f"{case.name}: {ran.stderr.strip() or f'exit code {ran.returncode}'}")
        record = json.loads(ran.stdout)
        return Counted(case, record["bytes"], [Launch(raw) for raw in record["launches"]])

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, cases))


# ---- reports


def _ratio(value: float, least: float) -> str:
    return f"{value / least:.2f}x" if least else "-"


def _amount(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"


HEADER = (
    "op",
    "kernel",
    "blocks",
    "instructions, by warpgroup",
    "MB must move",
    "distinct",
    "asked for",
    "sectors a request",
    "wavefronts",
    "multiplied",
    "boxes, products a stage",
    "waits",
)


def row_of(counted: Counted, launch: Launch) -> tuple[str, ...]:
    """The cells of a launch: counts, and beside them their ratio to the least."""
    ideal = ideal_of(counted.case, launch, counted.bytes, launch is counted.launches[0])
    threads = ("loads", "stores", "atomics", "copies")
    by_threads = launch.requests(*threads)
    stages = launch.raw["stages"]
    sizes = ", ".join(f"{name} {size}" for name, size in counted.case.sizes if name not in ("intermediate", "by"))
    way = f", {SELECTIONS[counted.case['by']]}" if counted.case.op == "ffn" else ""
    capability = f" sm{counted.case.capability}" if counted.case.capability != 90 else ""
    return (
        f"{counted.case.op}{capability} {sizes}{way}",
        launch.kernel,
        str(launch.grid),
        _amount(launch.instructions()) + (f" ({' / '.join(map(_amount, launch.by_role()))})"),
        f"{ideal.bytes / 1e6:.3g}",
        _ratio(launch.distinct() * SECTOR, ideal.bytes),
        _ratio(launch.sectors() * SECTOR, ideal.bytes),
        f"{launch.sectors(*threads) / by_threads:.3g}" if by_threads else "-",
        _amount(launch.wavefronts()) + f" ({_ratio(launch.wavefronts(), launch.least_wavefronts())})",
        _ratio(launch.multiplications(), ideal.multiplications),
        f"{launch.boxes() / stages:.3g}, {launch.products() / stages:.3g}" if stages else "-",
        _amount(launch.waits()),
    )


def rows_of(counted: Iterable[Counted]) -> list[tuple[str, ...]]:
    """The cells of a table: a row for each launch."""
    return [HEADER, *(row_of(entry, launch) for entry in counted for launch in entry.launches)]


LEGEND = """- MB must move: every operand once. Distinct: 32-byte sectors that the launch touches, each once (what memory moves if
  the caches keep everything); asked for: with those that several requests ask for (what L1 and L2 give). Both as a multiple.
- Sectors a request: of loads, stores and cp.async of threads; 4 where a warp asks for 128 neighbouring bytes, 16 for 512.
- Wavefronts: of shared memory, beside those without conflicts of banks. wgmma and TMA are not in them.
- Multiplied: products of tensor cores, padding included, beside those that the op needs.
- Instructions: of warps, as PTX has them, without moves and parameters; by warpgroup of a block. Waits: of warps, for
  mbarriers, wgmma, copies and barriers."""


def page(counted: Sequence[Counted]) -> str:
    """docs/counters.md."""
    ffn = [entry for entry in counted if entry.case.op == "ffn"]
    linear = [entry for entry in counted if entry.case.op == "linear"]
    others = [entry for entry in counted if entry.case.op not in ("ffn", "linear")]
    return f"""# What the CUDA kernels execute and move

Counted on the machine for PTX (cpp_tests/ptx), which runs nvcc's PTX with the real host code as an H100 (sm_90, 132
multiprocessors) would get it: exact numbers, whole grids, no sample and no time. Written by
`python -m flashu_ext.bench counters --write`, which also writes counters.json; `make ptx-test` counts small shapes again and
fails where a count of a kernel is more than {TOLERANCE:.0%} above counters.json. `flashu-ext bench ffn --counters` prints the
table for other shapes.

{LEGEND}

## Gathered FFN, bf16, 80 % of the neurons

{markdown_table(rows_of(ffn))}

## Linear layers of few rows, bf16

{markdown_table(rows_of(linear))}

## Other ops, bf16, 1460 tokens

{markdown_table(rows_of(others))}
"""


def to_json(counted: Iterable[Counted]) -> str:
    """All that was counted."""
    return json.dumps({entry.case.name: [launch.raw for launch in entry.launches] for entry in counted}, indent=1)


# ---- the baseline


def record(counted: Iterable[Counted]) -> dict[str, list[dict[str, Any]]]:
    """As the baseline has it: for every case its launches with their costs."""
    return {
        entry.case.name: [{"kernel": launch.kernel, **launch.costs()} for launch in entry.launches] for entry in counted
    }


def differences(
    now: dict[str, list[dict[str, Any]]], baseline: dict[str, list[dict[str, Any]]], tolerance: float = TOLERANCE
) -> tuple[list[str], list[str]]:
    """What is worse than the baseline, or not in it, and what is better; as sentences."""
    worse, better = [], []
    for name in sorted(now.keys() | baseline.keys()):
        if name not in baseline or name not in now:
            worse.append(f"{name}: {'not in the baseline' if name in now else 'in the baseline only'}")
            continue
        kernels, known = ([launch["kernel"] for launch in launches] for launches in (now[name], baseline[name]))
        if kernels != known:
            worse.append(f"{name}: launches {', '.join(kernels)}; the baseline {', '.join(known)}")
            continue
        for launch, before in zip(now[name], baseline[name], strict=True):
            for cost in sorted((launch.keys() | before.keys()) - {"kernel"}):
                is_now, was = launch.get(cost, 0), before.get(cost, 0)
                text = f"{name}, {launch['kernel']}: {cost} {was} -> {is_now}"
                if is_now > was * (1 + tolerance):
                    worse.append(text)
                elif is_now < was * (1 - tolerance):
                    better.append(text)
    return worse, better


def check(program: Path | None = None, baseline: Path = BASELINE) -> tuple[list[str], list[str]]:
    """Counts the checked cases and compares them with the baseline; see `differences`."""
    known = json.loads(baseline.read_text(encoding="utf-8"))
    return differences(record(count(CHECKED, program)), known["checked"])


def write(program: Path | None = None) -> None:
    """Makes the baseline and the page anew."""
    checked = record(count(CHECKED, program))
    shown = count(page_cases(), program)
    write_text(BASELINE, json.dumps({"checked": checked, "shown": record(shown)}, indent=1) + "\n")
    write_text(PAGE, page(shown))


@click.command(
    epilog="Example: python -m flashu_ext.bench counters --check, or: python -m flashu_ext.bench counters --op rms_norm"
)
@click.option("--op", "ops", multiple=True, help="Only this op (may be repeated).")
@click.option("--rows", default=1460, show_default=True, type=click.IntRange(1), help="Tokens.")
@click.option(
    "--check", "checks", is_flag=True, help="Compare small shapes with docs/counters.json; exit 1 where one is worse."
)
@click.option("--write", "writes", is_flag=True, help="Make docs/counters.json and docs/counters.md anew (minutes).")
@click.option(
    "--baseline",
    default=BASELINE,
    type=click.Path(exists=False, dir_okay=False, path_type=Path),
    help="With --check: another file than docs/counters.json.",
)
@click.option(
    "--program",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"{PROGRAM} of a build (default: the newest in build/).",
)
def main(ops: tuple[str, ...], rows: int, checks: bool, writes: bool, baseline: Path, program: Path | None) -> None:
    """Count what the CUDA kernels execute and move, without a GPU (needs a source checkout with the C++ tests built)."""
    try:
        if writes:
            write(program)
            click.echo(f"wrote {BASELINE} and {PAGE}")
            return
        if checks:
            worse, better = check(program, baseline)
            for line in better:
                click.echo(f"better: {line}")
            for line in worse:
                click.echo(f"worse: {line}", err=True)
            if worse:
                click.echo("where that is meant: python -m flashu_ext.bench counters --write", err=True)
            click.echo(f"counters: {len(CHECKED)} cases, {len(worse)} worse, {len(better)} better than {baseline.name}")
            sys.exit(1 if worse else 0)
        cases = [*ffn_cases("1.5b", (rows,), 0.8), *op_cases(rows, SHAPES["1.5b"][0])]
        unknown = set(ops) - {case.op for case in cases}
        if unknown:
            raise click.UsageError(
                f"--op: expected one of {', '.join(dict.fromkeys(case.op for case in cases))}, got {min(unknown)}"
            )
        click.echo(text_table(rows_of(count([case for case in cases if not ops or case.op in ops], program))))
    except (OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
