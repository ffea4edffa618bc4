"""Tests of the predicted times: occupancy, what bounds a kernel, extrapolated counts, and the published ladder."""

import copy
import re
import statistics

import pytest

from flashu_ext.bench.counters import Launch
from flashu_ext.bench.predict import (
    H100,
    PAGE_ROWS,
    errors,
    extrapolated,
    inversions,
    ladder,
    occupancy,
    predict,
    predicted_times,
    read_counts,
)
from flashu_ext.ops.explain import explain_ffn

NONE = {"requests": 0, "bytes": 0, "sectors": 0}
QUIET = {"requests": 0, "wavefronts": 0, "least": 0}


def launch(**changes):
    """One block on each multiprocessor: 64 stages of a 128 x 256 product by two warpgroups, fetched by a third."""
    blocks, stages = 132, 132 * 64
    raw = {
        "kernel": "product",
        "grid": [blocks, 1, 1],
        "cluster": 1,
        "threads": 384,
        "shared_bytes": 200 * 1024,
        "instructions": {"wgmma": [1, 1], "tma": [0, 0, 1]},
        "global": dict.fromkeys(("loads", "stores", "atomics", "copies", "box_stores"), NONE)
        | {"box_loads": {"requests": 2 * stages, "bytes": 49152 * stages, "sectors": 1536 * stages}},
        "multicast_bytes": 0,
        "distinct": {"read": 1536, "written": 0},
        "shared": dict.fromkeys(("loads", "stores", "copies", "ldmatrix", "stmatrix"), QUIET),
        "wgmma": {"256": 8 * stages},
        "wgmma_groups": 2 * stages,
        "wgmma_drains": 0,
        "mma": 0,
        "mma_depth": 0,
        "stages": stages,
        "stages_of_busiest_block": 64,
        "arrivals": 0,
        "waits": {"mbarrier": [1, 1, 1], "wgmma": [1, 1], "copies": [], "barrier": []},
    }
    return Launch(raw | changes)


@pytest.mark.parametrize(
    ("threads", "shared", "registers", "blocks"),
    [(128, 33 * 1024, 197, 2), (128, 17 * 1024, 61, 8), (384, 200 * 1024, 168, 1), (1024, 1024, 32, 2)],
)
def test_occupancy_is_the_least_of_registers_shared_memory_and_threads(threads, shared, registers, blocks):
    assert occupancy(launch(threads=threads, shared_bytes=shared), registers) == blocks


def test_a_product_is_bound_by_l2_or_by_tensor_cores():
    p = predict(launch(), 168)
    assert p.parts["tensor cores"] == 64 * 8 * 128
    assert p.parts["L2"] == pytest.approx(132 * 64 * 49152 / 5120)
    assert p.bound == "L2" and p.us == pytest.approx((p.parts["L2"] + H100.latency) / 1755, rel=1e-3)
    half = {"requests": 1, "bytes": 24576 * 132 * 64, "sectors": 768 * 132 * 64}
    fewer = launch()
    fewer.raw["global"]["box_loads"] = half
    assert predict(fewer, 168).bound == "tensor cores"


def test_waiting_for_every_stage_and_arrivals_keep_tensor_cores_waiting():
    waits = predict(launch(wgmma_drains=2 * 132 * 64, arrivals=132 * 64 * 10), 168).parts["tensor cores"]
    assert waits == pytest.approx(64 * (1024 + H100.drain + 10 * H100.arrival))


def test_the_busiest_block_counts():
    assert predict(launch(stages_of_busiest_block=128), 168).parts["tensor cores"] == 2 * 64 * 8 * 128


def test_without_a_warp_that_fetches_latency_counts_and_blocks_hide_it():
    alone = copy.deepcopy(
        launch(instructions={"wgmma": [1]}, waits=launch().raw["waits"] | {"wgmma": [1]}, wgmma_groups=132 * 64)
    )
    stage = H100.latency + 132 * 49152 / 5120 + 1024 + H100.drain
    assert predict(alone, 168).parts["latency"] == pytest.approx(64 * stage)
    alone.raw["grid"], alone.raw["threads"], alone.raw["shared_bytes"] = [264, 1, 1], 128, 50000
    alone.raw["stages_of_busiest_block"] = 32
    assert predict(alone, 168).parts["latency"] == pytest.approx(64 * stage / 2)


def test_counts_are_extrapolated_along_a_line():
    near, far = {"kernel": "k", "a": [10, {"b": 3}]}, {"kernel": "k", "a": [18, {"b": 3}]}
    assert extrapolated(near, far, 1, 2, 4) == {"kernel": "k", "a": [34, {"b": 3}]}
    with pytest.raises(ValueError, match="the same launches"):
        extrapolated("k", "l", 1, 2, 4)
    with pytest.raises(ValueError, match="linear in the depth"):
        extrapolated(1, 2, 1, 3, 4)


def test_missing_counts_are_named(tmp_path):
    with pytest.raises(ValueError, match="counts of kernel 1 at two depths"):
        read_counts(tmp_path)


def test_the_published_ladder_is_predicted_within_fifteen_per_cent():
    rungs = ladder()
    assert len(rungs) == 12
    assert statistics.fmean(map(abs, errors(rungs))) < 0.15
    assert inversions(rungs) <= 6


SIZES = {"1.5b": (1536, 7168), "7b": (3584, 15104)}  # hidden, neurons


@pytest.mark.parametrize(
    ("shape", "rows"), [(shape, rows) for shape in SIZES for rows in PAGE_ROWS[shape] if rows >= 64]
)
def test_the_choice_of_tiles_predicts_what_exact_counts_do(shape, rows):
    """The closed form in csrc/core/ffn_choice.cpp against the predictions from counts, a launch of the sum (2 us) apart."""
    text = explain_ffn(rows, *SIZES[shape], "bf16", False)
    chosen = re.findall(r" \* .*tiles of (\d) blocks? .* (\d+) us predicted, bound by (\w+)", text)
    assert len(chosen) == 2
    us = sum(int(us) - 2 * (int(blocks) > 1) for blocks, us, _ in chosen)
    assert us == pytest.approx(predicted_times()[f"{shape} M={rows}"], rel=0.15)
