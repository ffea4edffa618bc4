"""The tables of README and docs/measured.md, made from the committed results, so that no number there is typed by hand.

Between `<!-- results: NAME -->` and `<!-- end -->` stands what this command wrote there. The results are JSON files of
`flashu-ext bench`, `python -m flashu_ext.nano.evaluate` and `python -m flashu_ext.bench gpu`, in bench/results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..planning.tables import markdown_table

__all__ = ["RESULTS", "filled"]

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md")
_SECTION = re.compile(r"(<!-- results: ([a-z0-9_]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table([header, *rows])


def _source(record: dict[str, Any]) -> str:
    machine = record["machine"]
    if isinstance(machine, dict):
        machine = ", ".join(f"{name} {value}" for name, value in machine.items())
    return f"\n\n`{record['command']}` on {machine}"


def _ffn(record: dict[str, Any]) -> str:
    variants = list(record["results"][0]["microseconds"])
    rows = []
    for result in record["results"]:
        times = result["microseconds"]
        cells = [f"{times[name] / 1e3:.2f} ({times[name] / times['torch dense']:.2f}x)" for name in variants]
        rows.append([str(result["rows"]), *cells])
    settings = record["settings"]
    title = (
        f"Gathered FFN, {settings['shape']}, {settings['dtype']}, {100 * settings['keep']:.0f} % of the neurons: "
        "milliseconds (share of torch dense)\n\n"
    )
    return title + _table(["tokens", *variants], rows) + _source(record)


def _e2e(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        drawing = row["task"] == "generation"
        output = ""
        if row["equal_tokens"] is not None:
            output = f"{row['equal_tokens']} of {row['size']} tokens equal"
        elif row["difference"] is not None:
            output = f"latents differ by {row['difference']:.1e}"
        rows.append(
            [
                f"image, {row['size']} grid points" if drawing else f"answer, {row['size']} tokens",
                f"{row['program']} {row['preset']}",
                "" if row["backbone"] is None else f"{row['backbone']} / {row['head']}",
                f"{row['median']:.2f}",
                "" if row["baseline"] else f"{row['speedup']:.2f}x",
                "baseline" if row["baseline"] else output,
            ]
        )
    header = ["task", "program", "backbone / head runs", "s (median)", "speed-up", "output"]
    return _table(header, rows) + _source(record)


def _headline(record: dict[str, Any]) -> str:
    """Of the whole images and answers: what a user would compare."""
    shown = {("generation", 50), ("generation", 35), ("understanding", 32)}
    rows = [row for row in record["rows"] if (row["task"], row["size"]) in shown]
    ours = [row for row in rows if row["baseline"] or (row["program"] == "flashu_ext" and "," not in row["preset"])]
    return _e2e({**record, "rows": ours})


def _nano(record: dict[str, Any]) -> str:
    presets = record["presets"]
    names = list(next(iter(presets.values())))
    rows = []
    for name in names:
        cells = []
        for preset in presets.values():
            share = preset[name]
            low, high = share["interval"]
            cells.append(f"{100 * share['right'] / share['n']:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        rows.append([name, str(presets[next(iter(presets))][name]["n"]), *cells])
    title = "Right, in % with 95 % intervals, on scenes kept out of the training\n\n"
    return title + _table(["", "n", *presets], rows) + _source(record)


def _analysis(record: dict[str, Any]) -> str:
    verdicts = "\n".join(f"- {each}" for each in record["verdicts"])
    return f"{record['model']}:\n\n{verdicts}\n" + _source(record)


def _fidelity(record: dict[str, Any]) -> str:
    points = record["points"]
    dense = points[0]
    rows = []
    for point in points:
        shares = [f"{100 * point[task]['right'] / point[task]['n']:.1f}" for task in ("adherence", "accuracy")]
        rows.append(
            [
                point["name"],
                f"{1e3 * point['image_median']:.0f} ({dense['image_median'] / point['image_median']:.2f}x)",
                f"{point['flops'] / 1e9:.1f}",
                shares[0],
                "equal" if point["psnr"] >= 100 else f"{point['psnr']:.1f}",
                f"{1e3 * point['answer_median']:.1f} ({dense['answer_median'] / point['answer_median']:.2f}x)",
                shares[1],
            ]
        )
    header = [
        "setting",
        "ms / image",
        "GFLOP",
        "right drawings, %",
        "PSNR to dense, dB",
        "ms / answer",
        "right answers, %",
    ]
    n = f"{dense['adherence']['n']} drawings and {dense['accuracy']['n']} questions per setting, held-out scenes\n\n"
    return n + _table(header, rows) + _source(record)


def _gpu(record: dict[str, Any]) -> str:
    rows = []
    for line in record["lines"]:
        times = line["timing"]["microseconds"]
        ours, base = times.get(line["ours"]), times.get(line["baseline"])
        rows.append(
            [
                f"{line['op']} {line['shape']}",
                "-" if ours is None else f"{ours:.1f}",
                "-" if line["goal_us"] is None else f"{line['goal_us']:g}",
                "-" if base is None else f"{base:.1f}",
                "-" if ours is None or base is None else f"{base / ours:.2f}x",
            ]
        )
    return _table(["op", "us", "goal", "baseline us", "speed-up"], rows) + _source(record)


def _e2e_gpu(record: dict[str, Any]) -> str:
    from .e2e_gpu import check, table_rows

    header, rows = table_rows(check(record))
    return _table(header, rows) + _source(record)


def _linear(record: dict[str, Any]) -> str:
    from .linear import SHAPES

    rows = []
    for row in record["results"]:
        n, k = SHAPES[row["shape"]]
        ours = row["linear_us"]
        cells = [f"{row['torch_us']:.0f}", f"{ours:.0f}", f"{row['torch_us'] / ours:.2f}x"]
        rows.append(
            [f"{row['shape']}, {n} x {k}", str(row["rows"]), *cells, f"{2e-3 * row['rows'] * n * k / ours:.0f}"]
        )
    title = f"Linear layer with bias, {record['settings']['dtype']}: microseconds\n\n"
    return title + _table(["shape", "tokens", "torch", "linear", "speed-up", "GFLOP/s"], rows) + _source(record)


def _arrivals(record: dict[str, Any]) -> str:
    from .arrivals import Row

    rows = []
    for given in record["results"]:
        row = Row(**given)
        shares = [f"{row.percentile(share):.2f}" for share in (0.5, 0.95)]
        rows.append([f"{row.load:g}", row.way, f"{row.per_second:.2f}", *shares])
    settings = record["settings"]
    title = (
        f"{settings['task'].capitalize()} of {settings['model']} ({settings['preset']}), {settings['requests']} in each run; one "
        f"alone takes {record['alone']:.2f} s. Load 1 is as many as can be served one by one\n\n"
    )
    return title + _table(["load", "served", "per second", "p50 latency, s", "p95 latency, s"], rows) + _source(record)


def _profile(record: dict[str, Any]) -> str:
    rows = [[f"`{row['operator']}`", str(row["calls"]), f"{100 * row['share']:.1f}"] for row in record["rows"][:6]]
    rest = sum(row["share"] for row in record["rows"][6:])
    rows.append([f"{len(record['rows']) - 6} more", "", f"{100 * rest:.1f}"])
    share = 100 * record["ours"]
    title = (
        f"{record['task'].capitalize()} ({record['preset']}, {record['size']} grid points): **{share:.1f} %** of the time inside "
        "operators is in this library's\n\n"
    )
    return title + _table(["operator", "calls", "% of the time"], rows) + _source(record)


def _steps(record: dict[str, Any]) -> str:
    from .steps import tables

    return tables(record) + _source(record)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "analysis": _analysis,
    "arrivals": _arrivals,
    "ffn": _ffn,
    "e2e": _e2e,
    "e2e_gpu": _e2e_gpu,
    "headline": _headline,
    "linear": _linear,
    "nano": _nano,
    "fidelity": _fidelity,
    "gpu": _gpu,
    "profile": _profile,
    "serve": _arrivals,
    "steps": _steps,
}
"""By a section's name, or by its first word; the rest says which file: `ffn_bf16` is results/ffn_bf16.json."""

FILES = {"headline": "e2e"}
"""Sections that show a part of another one's result."""

PENDING = {
    "e2e_gpu": "Not run yet, no GPU was at hand: `flashu-ext bench e2e --gpu --json e2e_gpu.json --plot e2e_gpu.png`"
}
"""What a section says until its result is there; for sections that are not listed a missing result is an error."""


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with every results section written anew.

    Raises:
        ValueError: a section has an unknown name, or its result is missing.
    """

    def section(match: re.Match[str]) -> str:
        name = match[2]
        kind = name if name in TABLES else name.split("_")[0]
        path = results / f"{FILES.get(name, name)}.json"
        if kind not in TABLES:
            raise ValueError(f"results section: expected one of {', '.join(TABLES)}, got {name!r}")
        if not path.is_file() and name in PENDING:
            return f"{match[1]}{PENDING[name]}\n{match[3]}"
        if not path.is_file():
            raise ValueError(f"results section {name}: {path} is missing")
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"{match[1]}{TABLES[kind](record)}\n{match[3]}"

    return _SECTION.sub(section, text)


@click.command(epilog="Example: python -m flashu_ext.bench readme --check")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where a page differs from the results.")
@click.option(
    "--page",
    "pages",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A page (may be repeated); default: README.md and docs/measured.md.",
)
def main(check: bool, pages: tuple[Path, ...]) -> None:
    """Write the pages' tables from the committed results."""
    for page in pages or PAGES:
        text = page.read_text(encoding="utf-8")
        try:
            new = filled(text)
        except ValueError as error:
            raise click.ClickException(f"{page}: {error}") from None
        if check and new != text:
            sys.exit(f"{page}: its tables differ from the results: python -m flashu_ext.bench readme")
        if not check:
            page.write_text(new, encoding="utf-8")
