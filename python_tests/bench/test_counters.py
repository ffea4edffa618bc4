"""Tests of the counts of kernels: their names, ideals, costs and the comparison with the baseline."""

import copy
import json

import pytest
from click.testing import CliRunner

from flashu_ext.bench import counters
from flashu_ext.bench.counters import (
    Case,
    Counted,
    Launch,
    differences,
    ffn_cases,
    ideal_of,
    record,
    rows_of,
    short_name,
)
from flashu_ext.cli.main import cli
from flashu_ext.planning.tables import text_table

NONE = {"requests": 0, "bytes": 0, "sectors": 0}
QUIET = {"requests": 0, "wavefronts": 0, "least": 0}
UP = (
    "void flashu::cuda::(anonymous namespace)::gemm_sm90<flashu::cuda::(anonymous namespace)::Config<flashu::bfloat16, "
    "true, 112, (flashu::core::FfnFetch)1, 1> >(flashu::cuda::FfnGemm, flashu::cuda::(anonymous namespace)::Maps)"
)


def launch(**changes):
    """A product of 128 rows with 112 neurons at hidden size 64: one stage, 3 boxes."""
    raw = {
        "kernel": UP,
        "grid": [1, 1, 1],
        "cluster": 1,
        "threads": 384,
        "shared_bytes": 215040,
        "instructions": {"integer": [100, 100, 50], "special": [28, 28], "free": [7, 7, 7], "tma": [0, 0, 3]},
        "global": {
            "loads": NONE,
            "stores": NONE,
            "atomics": NONE,
            "copies": NONE,
            "box_loads": {"requests": 3, "bytes": 45056, "sectors": 1408},
            "box_stores": {"requests": 4, "bytes": 32768, "sectors": 896},
        },
        "multicast_bytes": 0,
        "distinct": {"read": 1408, "written": 896},
        "shared": {
            "loads": QUIET,
            "stores": QUIET,
            "copies": QUIET,
            "ldmatrix": QUIET,
            "stmatrix": {"requests": 32, "wavefronts": 150, "least": 128},
        },
        "wgmma": {"224": 8},
        "wgmma_groups": 2,
        "wgmma_drains": 2,
        "mma": 0,
        "mma_depth": 0,
        "stages": 1,
        "waits": {"mbarrier": [4, 4, 1], "wgmma": [8, 8], "copies": [2, 2], "barrier": [8, 8, 4]},
    }
    return Launch(raw | changes)


CASE = Case.of("ffn", rows=128, hidden=64, intermediate=112, neurons=112, by=0)


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        (UP, "gemm_sm90 up 112 range"),
        (UP.replace("FfnFetch)1, 1", "FfnFetch)3, 2"), "gemm_sm90 up 112 eights pairs"),
        (UP.replace("true, 112", "false, 256").replace("bfloat16", "float16"), "gemm_sm90 down 256 range float16"),
        (
            "void flashu::cuda::(anonymous namespace)::move_rows<flashu::bfloat16, long>(long)",
            "move_rows<bfloat16, long>",
        ),
        (
            "void flashu::cuda::(anonymous namespace)::gemm_sm80<flashu::cuda::(anonymous namespace)::Config<flashu::bfloat16, "
            "false, 256, (flashu::cuda::(anonymous namespace)::Reads)0, (flashu::cuda::(anonymous namespace)::Reads)2> >"
            "(flashu::cuda::FfnGemm)",
            "gemm_sm80 down 256 vectors/listed",
        ),
        ("delta_total", "delta_total"),
    ],
)
def test_names_of_kernels_are_short(kernel, short):
    assert short_name(kernel) == short


def test_costs_are_sums_of_the_counts():
    assert launch().costs() == {
        "instructions": 100 + 100 + 50 + 28 + 28 + 3,
        "busiest warpgroup": 128,
        "special functions": 56,
        "requests": 7,
        "sectors": 1408 + 896,
        "distinct sectors": 1408 + 896,
        "wavefronts": 150,
        "bank conflicts": 22,
        "multiplications": 64 * 224 * 16 * 8,
        "boxes": 3,
        "stages": 1,
        "waits": 9 + 16 + 4 + 20,
    }


def test_ideals_of_the_halves_and_of_other_ops():
    up = ideal_of(CASE, launch(), 0)
    assert up.bytes == 2 * (2 * 112 * 64 + 128 * 64 + 128 * 112) and up.multiplications == 2 * 128 * 112 * 64
    down = ideal_of(CASE, launch(kernel=UP.replace("true", "false")), 0)
    assert down.bytes == 2 * (112 * 64 + 128 * 112 + 2 * 128 * 64) and down.multiplications == 128 * 112 * 64
    norm = Case.of("rms_norm", rows=2, width=8, modulated=0)
    assert ideal_of(norm, launch(), 80).bytes == 80 and ideal_of(norm, launch(), 80, first=False).bytes == 0


def test_the_table_has_a_line_a_launch():
    lines = text_table(rows_of([Counted(CASE, 0, [launch(), launch()])])).splitlines()
    assert len(lines) == 3 and "gemm_sm90 up 112 range" in lines[1] and "1.00x" in lines[1]


def test_a_count_that_is_more_than_two_per_cent_worse_is_named():
    known = record([Counted(CASE, 0, [launch()])])
    assert differences(known, known) == ([], [])
    now = copy.deepcopy(known)
    (name,) = now
    now[name][0]["sectors"] = 2304 * 102 // 100
    assert differences(now, known) == ([], [])
    now[name][0]["sectors"] = 2304 * 103 // 100
    worse, better = differences(now, known)
    assert worse == [f"{name}, gemm_sm90 up 112 range: sectors 2304 -> 2373"] and better == []
    now[name][0]["sectors"] = 1000
    assert differences(now, known) == ([], [f"{name}, gemm_sm90 up 112 range: sectors 2304 -> 1000"])


def test_a_count_that_was_none_and_other_launches_are_worse():
    known = record([Counted(CASE, 0, [launch()])])
    (name,) = known
    now = copy.deepcopy(known)
    known[name][0]["bank conflicts"] = 0
    assert differences(now, known)[0] == [f"{name}, gemm_sm90 up 112 range: bank conflicts 0 -> 22"]
    now[name].append({"kernel": "another"})
    assert "launches gemm_sm90 up 112 range, another; the baseline gemm_sm90" in differences(now, known)[0][0]
    assert differences({}, known)[0] == [f"{name}: in the baseline only"]
    assert differences(known, {})[0] == [f"{name}: not in the baseline"]


def test_cases_name_shapes_and_selections():
    cases = ffn_cases("1.5b", (64,), 0.8)
    assert [case["by"] for case in cases] == [0, 1, 2, 3]
    assert cases[0].argument == "ffn:rows=64,hidden=1536,intermediate=8960,neurons=7168,by=0"
    assert cases[0].name == f"sm90 {cases[0].argument}"


def test_without_the_program_the_command_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(counters, "ROOT", tmp_path)
    result = CliRunner().invoke(cli, ["bench", "ffn", "--counters", "--dtype", "bf16"])
    assert result.exit_code != 0
    assert "cmake --build build/cpython-311 --target flashu_count_ops" in result.output


def test_only_bf16_is_counted():
    result = CliRunner().invoke(cli, ["bench", "ffn", "--counters"])
    assert result.exit_code == 2 and "expected --dtype bf16, got fp32" in result.output


def test_the_baseline_has_the_checked_cases():
    known = json.loads(counters.BASELINE.read_text(encoding="utf-8"))["checked"]
    assert list(known) == [case.name for case in counters.CHECKED]
